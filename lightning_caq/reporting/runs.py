"""Runs: what a run left in its folder, read back as far as it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lightning_caq.errors import PlanError
from lightning_caq.plan import QuantizationPlan
from lightning_caq.profile import CurvatureProfile
from lightning_caq.report import QuantizationReport

FILES = ("report.json", "profile.json", "plan.json")
_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Run:
    """A run, as far as its files are there and whole.

    Attributes:
        folder: Where its files are.
        report: What came of it, or ``None``.
        profile: What was measured, or ``None``.
        plan: What was done to the network, or ``None``.
        problems: File to what is wrong with it.
    """

    folder: Path
    report: QuantizationReport | None
    profile: CurvatureProfile | None
    plan: QuantizationPlan | None
    problems: dict[str, str]


def read_run(log_dir: str | Path) -> Run:
    """Read a run from its log folder, or from the ``caq`` folder in it.

    Args:
        log_dir: The folder.

    Returns:
        The run; a part whose file is missing or damaged is ``None``, and ``problems`` says why.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no run; the message names the runs that lie deeper.
    """
    log_dir = Path(log_dir)
    if not log_dir.is_dir():
        raise FileNotFoundError(f"{log_dir} is no folder; give the log folder of a run.")
    folder = next((f for f in (log_dir / "caq", log_dir) if any((f / name).is_file() for name in FILES)), None)
    if folder is None:
        below = sorted({path.parent.parent for name in FILES for path in log_dir.glob(f"**/caq/{name}")})
        runs = f" It holds runs deeper down: {', '.join(map(str, below))}." if below else ""
        raise FileNotFoundError(
            f"{log_dir} holds no run: there is none of {', '.join(FILES)} in it or in its folder caq.{runs}"
        )
    problems: dict[str, str] = {}

    def part(name: str, read: Callable[[Path], _Part]) -> _Part | None:
        path = folder / name
        if not path.is_file():
            problems[name] = "is missing"
            return None
        try:
            return read(path)
        except PlanError as error:
            problems[name] = f"cannot be used: {error}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems[name] = f"is damaged ({type(error).__name__}: {error})"
        return None

    return Run(
        folder,
        part("report.json", lambda path: QuantizationReport.from_json(path.read_text(encoding="utf-8"))),
        part("profile.json", lambda path: CurvatureProfile.from_json(path.read_text(encoding="utf-8"))),
        part("plan.json", QuantizationPlan.load),
        problems,
    )
