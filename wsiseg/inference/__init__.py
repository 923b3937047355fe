"""How it predicts a slide: windows, blending, bounded memory."""
