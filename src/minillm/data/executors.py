"""The same work on many machines: files are checked or tokenized by datatrove's executors, on Ray or Slurm.

`FileTasks` is what an executor runs. Each file gives one file of results under its number, whichever task did it. So
neither the number of tasks nor their order shows in what is read back, and after a crash only the files without
results are left to do.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import os
import pickle
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from minillm import __version__, log
from minillm.atomic import write_atomic
from minillm.config import UsageError
from minillm.log import UserError

OURS = ("self", "pipeline", "depends", "logging_dir", "skip_completed")  # arguments of executors that are set here


@dataclass(frozen=True)
class ExecutorSettings:
    """Where the work is done"""

    executor: str = field(
        default="local",
        metadata={
            "help": "this machine (local), or a cluster, file by file: ray, slurm (see docs/data-at-scale.md)",
            "choices": ("local", "ray", "slurm"),
        },
    )
    executor_config: str = field(
        default="",
        metadata={
            "help": "YAML file with arguments of datatrove's executor for ray or slurm: tasks, workers, time, ..."
        },
    )


LOCAL = ExecutorSettings()


class _Reader(pickle.Unpickler):
    """Reads results without running what a file names: our own rows and NumPy's arrays are made, nothing else."""

    ARRAYS = frozenset({"ndarray", "dtype", "_reconstruct", "_frombuffer", "scalar"})

    def find_class(self, module: str, name: str) -> Any:
        ours = module.startswith("minillm.data.") and "." not in name
        arrays = module.partition(".")[0] == "numpy" and name in self.ARRAYS
        if ours or arrays or (module, name) == ("collections", "Counter"):
            found = super().find_class(module, name)
            rows = isinstance(found, type) and (is_dataclass(found) or issubclass(found, tuple))
            if rows or not ours:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a result")


class FileTasks:
    """`work(unit, *arguments)` of every unit (a file, say), which gives results one by one, kept in `folder`.

    It is a step of a datatrove pipeline: task `rank` of `world_size` does each world_size-th unit that is left.
    """

    def __init__(
        self, work: Callable[..., Iterable[Any]], units: Sequence[Any], arguments: tuple[Any, ...], folder: Path
    ) -> None:
        self.work, self.units, self.arguments, self.folder = work, list(units), arguments, folder.absolute()
        self.left = self.missing()
        self.place = os.getcwd()  # where the paths hold, so that names are the same everywhere

    def __repr__(self) -> str:
        return f"{self.work.__name__} of {len(self.left)} files"

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Does the units of one task. One that cannot be used leaves its UserError for `problem`."""
        os.chdir(self.place)
        for number in self.left[rank::world_size]:
            if not self._results(number).exists():
                self._do(number)

    def _do(self, number: int) -> None:
        self._problem(number).unlink(missing_ok=True)

        def write(beside: Path) -> None:
            with open(beside, "wb") as stream:
                for result in self.work(self.units[number], *self.arguments):
                    pickle.dump(result, stream)
                pickle.dump(None, stream)  # the end

        try:
            write_atomic(self._results(number), write)
            log.info(f"[data] file {number + 1:,} of {len(self.units):,} is done")
        except UserError as error:
            self._problem(number).write_text(str(error), encoding="utf-8")

    def missing(self) -> list[int]:
        """The units without results."""
        return [number for number in range(len(self.units)) if not self._results(number).exists()]

    def problem(self) -> str:
        """What was wrong with the first unit that cannot be used; "" where there is none."""
        for number in self.missing():
            if self._problem(number).exists():
                return self._problem(number).read_text(encoding="utf-8")
        return ""

    def results(self) -> Iterator[Any]:
        """The results of all units, in the order of the units. Raises UserError when some are not whole."""
        with log.progress(len(self.units), "[data] files put together") as bar:
            for number in range(len(self.units)):
                path = self._results(number)
                try:
                    with open(path, "rb") as stream:
                        while (result := _Reader(stream).load()) is not None:
                            yield result
                except (OSError, EOFError, pickle.UnpicklingError) as error:
                    raise UserError(
                        f"{path} cannot be read ({error}). Remove it and run the same command again."
                    ) from error
                bar.advance()

    def remove(self) -> None:
        """Removes the results, which are not needed any more, and the logs unless a job still writes them."""
        for number in range(len(self.units)):
            self._results(number).unlink(missing_ok=True)
        if not _inside_slurm():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _results(self, number: int) -> Path:
        return self.folder / f"{number:06d}.results"

    def _problem(self, number: int) -> Path:
        return self.folder / f"{number:06d}.problem"


class Again:
    """A step of a datatrove pipeline that runs one of our commands once more, when all results are there."""

    def __init__(self, command: Callable[..., None], *settings: Any) -> None:
        self.command, self.settings = command, settings

    def __repr__(self) -> str:
        return f"{self.command.__module__} puts the results together"

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        self.command(*self.settings)


def folder_for(output: Path, identity: dict[str, Any]) -> Path:
    """Where results wait beside the output: another folder for all that gives other results."""
    text = json.dumps({"version": __version__, **identity}, sort_keys=True)
    return output.with_name(f"{output.name}.tasks-{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def run_tasks(tasks: FileTasks, settings: ExecutorSettings, again: Again) -> bool:
    """Has an executor do what is left of the tasks. True: all results are there. False: they will be, and a job of
    the cluster will then run `again`.

    Raises UserError when datatrove or the cluster's commands are missing, the YAML file is wrong, or files are left.
    """
    options = _read_options(settings)
    if tasks.left and not _inside_slurm():
        logs = tasks.folder / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        options = {"tasks": len(tasks.left), **options}
        log.info(
            f"[data] {settings.executor}: {len(tasks.left):,} of {len(tasks.units):,} files in {options['tasks']:,} "
            f"tasks, results in {tasks.folder}, logs in {logs}"
        )
        tasks.folder.mkdir(parents=True, exist_ok=True)
        if settings.executor == "slurm":
            _submit(tasks, options, again, logs)
            return False
        _run_on_ray(tasks, options, logs)
    left = tasks.missing()
    if left:
        raise UserError(
            f"{len(left):,} of {len(tasks.units):,} files are not done. {tasks.problem()}\nThe others are kept: the "
            f"same command goes on from there. Logs are in {tasks.folder / 'logs'}."
        )
    return True


def _inside_slurm() -> bool:
    """Is this process one of the jobs that datatrove has handed to Slurm?"""
    return "SLURM_ARRAY_TASK_ID" in os.environ


def _run_on_ray(tasks: FileTasks, options: dict[str, Any], logs: Path) -> None:
    import ray
    from datatrove.executor import RayPipelineExecutor
    from loguru import logger

    logger.disable("datatrove")  # what it says here, in many lines, is in the logs
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init()  # the cluster of RAY_ADDRESS or of this machine, else a new one on this machine
    try:
        RayPipelineExecutor([tasks], logging_dir=str(logs), skip_completed=False, **options).run()
    finally:
        logger.enable("datatrove")
        if started:
            ray.shutdown()


def _submit(tasks: FileTasks, options: dict[str, Any], again: Again, logs: Path) -> None:
    """Hands two jobs to Slurm: the files, and behind them the rest of the command."""
    from datatrove.executor import SlurmPipelineExecutor

    behind = options.pop("merge", {})
    options = {"job_name": "minillm-data", **options}
    behind = {**options, "job_name": f"{options['job_name']}-merge", **behind, "tasks": 1, "workers": 1}
    files = SlurmPipelineExecutor([tasks], logging_dir=str(logs / "files"), skip_completed=False, **options)
    merge = SlurmPipelineExecutor(
        [again], logging_dir=str(logs / "merge"), skip_completed=False, depends=files, **behind
    )
    try:
        merge.run()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"The jobs could not be handed to Slurm: {error}. Is this a machine with sbatch?") from error
    log.info("[data] handed to Slurm: a job for the files, and one behind it that puts them together")


def _read_options(settings: ExecutorSettings) -> dict[str, Any]:
    """The arguments in --executor_config, checked against those of the executor. Raises UserError."""
    import yaml

    try:
        from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor

        if settings.executor == "ray":
            import ray  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--executor {settings.executor} needs datatrove and Ray ({error}). Install them with: "
            "pip install 'minillm-trainer[scale]'"
        ) from error
    path = settings.executor_config
    options: dict[str, Any] = {}
    if path:
        try:
            options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"--executor_config {path} cannot be read: {error}") from None
    executor = RayPipelineExecutor if settings.executor == "ray" else SlurmPipelineExecutor
    signature = inspect.signature(executor).parameters
    known = {name for name in signature if name not in OURS}
    needed = {name for name in known if signature[name].default is inspect.Parameter.empty} - {"tasks"}
    if settings.executor == "slurm":
        known.add("merge")
    if not isinstance(options, dict) or not isinstance(options.get("merge", {}), dict):
        raise UsageError(f"{path} must hold `name: value` lines")
    for name in [*options, *options.get("merge", {})]:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{path}: {executor.__name__} of datatrove takes no {name!r}.{hint}")
    if missing := sorted(needed - {*options}):
        raise UsageError(f"--executor {settings.executor} needs {', '.join(missing)} in --executor_config FILE.yaml")
    return options
