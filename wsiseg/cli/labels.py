"""Match slides with their annotations or mask images, and settle the class table."""

import os
from collections.abc import Sequence
from pathlib import Path

import click

from wsiseg.classes import ClassTable
from wsiseg.errors import AnnotationError
from wsiseg.settings.tile import TileConfig
from wsiseg.slides.cohort import CohortEntry
from wsiseg.slides.label_image import SUFFIXES, find_label_image
from wsiseg.stages.tile import TileJob, derive_classes
from wsiseg.vector.outline import find_annotation

MAX_THREADS = 8
"""Threads that read one slide; beyond this, writing the store is the bottleneck."""


def find_labels(
    entries: Sequence[CohortEntry],
    config: TileConfig,
    *,
    output: Path,
    annotations: Path | None,
    labels: Path | None,
    classes_file: Path | None,
    overwrite: bool,
    workers: int,
) -> list[TileJob]:
    """Return one job per slide; a slide without annotation is tiled without labels."""
    if annotations is not None and labels is not None:
        raise click.UsageError("--annotations and --labels exclude each other")
    for option, path in (("--annotations", annotations), ("--labels", labels)):
        if path is not None and not path.exists():
            raise click.UsageError(f"{option} {path}: no such file or folder")
    if labels is not None and not labels.is_dir():
        raise click.UsageError(f"--labels {labels}: must be a folder of mask images")
    named = [_annotation_of(e, annotations, alone=len(entries) == 1) for e in entries]
    images = [
        path
        if path is not None and path.suffix.lower() in SUFFIXES
        else find_label_image(labels, e.slide_id)
        if labels is not None
        else None
        for e, path in zip(entries, named, strict=True)
    ]
    found = [None if image else path for path, image in zip(named, images, strict=True)]
    for option, folder, matches in (
        ("--annotations", annotations, found),
        ("--labels", labels, images),
    ):
        if folder is not None and not any(matches):
            raise AnnotationError(
                f"{option} {folder}: nothing there is named after a slide, such as "
                f"'{entries[0].slide_id}.*'"
            )
    classes = _class_table(
        classes_file,
        [(e, p) for e, p in zip(entries, found, strict=True) if p],
        has_images=any(images),
    )
    threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // workers))
    return [
        TileJob(
            entry=entry,
            config=config,
            output=output / f"{entry.slide_id}.zarr",
            annotation=annotation,
            label_image=image,
            classes=classes,
            overwrite=overwrite,
            threads=threads,
        )
        for entry, annotation, image in zip(entries, found, images, strict=True)
    ]


def _annotation_of(entry: CohortEntry, annotations: Path | None, *, alone: bool) -> Path | None:
    if entry.annotation is not None:
        return entry.annotation
    if annotations is None:
        return None
    if annotations.is_dir():
        return find_annotation(annotations, entry.slide_id)
    if not alone:
        raise click.UsageError(
            f"--annotations {annotations}: one file cannot serve several slides; give a folder"
        )
    return annotations


def _class_table(
    file: Path | None, annotations: list[tuple[CohortEntry, Path]], *, has_images: bool
) -> ClassTable | None:
    if file is not None:
        return ClassTable.from_yaml(file)
    if annotations:
        return derive_classes(annotations)
    return ClassTable.of_names(["Foreground"]) if has_images else None
