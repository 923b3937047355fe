"""How much to do, with which seed, and the scorecard at the end; shared by all of reliability.

`make test` runs each test at its PR figure with seed 0. `make soak` sets WSISEG_SOAK_SCALE and
runs the NIGHT figure times that; its seed is drawn, printed, and taken from WSISEG_SOAK_SEED to
repeat a run.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from reliability.scorecard import Scorecard
from soak import base_seed, chosen, soak_scale

if TYPE_CHECKING:
    from reliability.bench import Bench

SCORECARD = pytest.StashKey[Scorecard]()
SEED = pytest.StashKey[int]()

Figure = Callable[..., int]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SEED] = base_seed()
    config.stash[SCORECARD] = Scorecard()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give time for the bench, which may have to compile, and for figures; a soak has no limit."""
    for item in items:
        if soak_scale() is None and {"bench", "figure"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def scorecard(pytestconfig: pytest.Config) -> Scorecard:
    """Counts for the table at the end: `scorecard.add("kills survived", 1)`."""
    return pytestconfig.stash[SCORECARD]


@pytest.fixture(scope="session")
def figure() -> Figure:
    """Return how often to do something: `figure(pr=25, night=500)`."""
    choose: Figure = chosen
    return choose


@pytest.fixture(scope="session", name="soak_scale")
def soak_scale_fixture() -> float | None:
    scale: float | None = soak_scale()
    return scale


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed for this test; one for the run, another for each test. Shown if the test fails."""
    base = request.config.stash[SEED]
    print(f"WSISEG_SOAK_SEED={base}")  # noqa: T201 - pytest shows it with a failure
    return (base + zlib.crc32(request.node.nodeid.encode())) % 2**32


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    card = config.stash[SCORECARD]
    if not card.is_empty:
        terminalreporter.section(f"reliability scorecard (seed {config.stash[SEED]})")
        for line in card.lines():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Bench"]:
    """Every command on a small slide, in forks of a process that has imported them."""
    from reliability.bench import LANES, MODULES, Bench
    from reliability.zygote import Zygote

    with Zygote(*MODULES, num_lanes=LANES) as zygote:
        yield Bench(zygote, tmp_path_factory.mktemp("bench"))
