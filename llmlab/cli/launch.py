"""`--accelerate NAME|FILE`: starts a command again in the processes of `accelerate launch`, once it is checked. The
processes are Accelerate's and torch's; here are the checks before, and how signals and exit codes pass through."""

import json
import logging
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

from typer import Option

from llmlab.settings.errors import LAUNCHED, UserError, did_you_mean, reading, reason_of
from llmlab.settings.files import read_json
from llmlab.settings.paths import shipped_folder
from llmlab.settings.sources import Resolved
from llmlab.settings.trust import REMOTE_CODE, remote_code_allowed
from llmlab.stages import STAGES, Stage

CONFIGS = shipped_folder("accelerate_configs")
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SINGLE = {"single_gpu": "cuda", "mps": "mps"}  # the device of a shipped configuration for one process
INSIDE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")  # what launchers set in each process
TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")
VALUED = ("--accelerate", "--num-processes", "--launch-args")
TIME_TO_SAVE = 3600  # seconds that an interrupted run has for its checkpoint; torch's own limit is 30

option = partial(Option, rich_help_panel="Launch")
by_name = f"Launch by this Accelerate configuration: {', '.join(NAMES)}."
Accelerate = Annotated[str | None, option(metavar="NAME|FILE", help=by_name)]
NumProcesses = Annotated[int | None, option(min=1, help="Processes, of all machines; by default one per visible GPU.")]
LaunchArgs = Annotated[str, option(help="Further options of accelerate launch: '--machine_rank 1'.")]
PrintLaunch = Annotated[bool, option("--print-launch", help="Print the accelerate command and exit.")]


@dataclass(frozen=True)
class Launch:
    """What to launch by: a configuration file, the number of processes and further words for `accelerate launch`."""

    name: str
    path: Path
    num_processes: int | None
    words: tuple[str, ...]

    def command(self, arguments: Sequence[str], device: str, *, here: bool) -> tuple[list[str], Any]:
        """Returns the words after `accelerate launch` that start `llmlab ARGUMENTS`, and Accelerate's reading of them.
        `device` is the setting; `here` refuses what this machine cannot run, besides what no machine can."""
        import torch
        from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
        from accelerate.commands.launch import launch_command_parser

        def refuse(problem: str) -> NoReturn:
            raise UserError(f"--accelerate {self.name}: {problem}")

        with reading(self.path, "an Accelerate configuration"):
            config = load_config_from_file(str(self.path))
        kind, several = config.distributed_type.value, config.distributed_type.value != "NO"
        if not isinstance(config, ClusterConfig) or kind not in TYPES:
            refuse(f"distributed_type = {kind}: expected one of {', '.join(TYPES)}")
        if config.use_cpu and device not in ("auto", "cpu"):
            refuse(f"use_cpu = true there contradicts device = {device}; keep one")
        on_cpu = config.use_cpu or kind == "MULTI_CPU" or device == "cpu"
        if on_cpu and kind in ("FSDP", "DEEPSPEED"):
            refuse(f"{kind} needs GPUs (Accelerate shards nothing on a CPU); expected --accelerate cpu there")
        if here and kind == "DEEPSPEED" and find_spec("deepspeed") is None:
            refuse("DeepSpeed is not installed; pip install 'llmlab[deepspeed]', or use fsdp2")
        gpus, needed = torch.cuda.device_count(), "cuda" if several else SINGLE.get(self.name)
        if here and not on_cpu and needed and not getattr(torch, needed).is_available():
            gpu = "CUDA GPU" if needed == "cuda" else "Apple GPU"
            refuse(f"this machine has no {gpu} that torch can use; expected --accelerate cpu here")
        parser = launch_command_parser()
        parser.error = _refuse  # type: ignore[method-assign]
        options = parser.parse_args([*self.words, "llmlab"])
        if options.training_script != "llmlab" or options.config_file:
            _refuse("expected options of accelerate launch alone, without a script or --config_file")
        machines, count = options.num_machines or config.num_machines, self.num_processes or options.num_processes
        if machines > 1 and not (options.main_process_ip or config.main_process_ip):
            each = '--launch-args "--machine_rank 0 --main_process_ip 10.0.0.1"'
            refuse(f"{machines} machines need the first one's address, and each its number: {each}")
        if count is None and several and gpus and not on_cpu and (self.name in NAMES or config.num_processes < 1):
            count = gpus * machines
        words = ["--config_file", str(self.path), *self.words]
        words += [] if count in (None, options.num_processes) else ["--num_processes", str(count)]
        count = count or config.num_processes
        wrong = f"num_processes = {count}"
        if count < 1 or count % machines:
            refuse(f"{wrong}: expected --num-processes with a multiple of its {machines} machines")
        if count > 1 and not several and not on_cpu:
            refuse(f"{wrong}: it starts one process; expected ddp or fsdp2 for several")
        if here and not on_cpu and count > max(gpus, 1) * machines:
            refuse(f"{wrong}: this machine has {gpus} visible GPUs, one for each process")
        if count > 1 and kind in ("NO", "MULTI_CPU"):
            words += ["--multi_gpu"]  # without it Accelerate starts one process on a CPU, whatever is asked for
        words += ["-m", "llmlab", *arguments]
        parsed = parser.parse_args(words)
        parsed.num_processes, parsed.num_machines, parsed.use_cpu = count, machines, on_cpu
        return words, parsed

    @property
    def processes(self) -> int:
        """The number of processes, as far as no stage's settings decide it."""
        return self.command((), "auto", here=False)[1].num_processes

    def run(self, arguments: Sequence[str], device: str = "auto") -> None:
        """Runs `llmlab ARGUMENTS` in every process; raises SystemExit with the exit code where it is not 0."""
        from accelerate.commands.launch import launch_command
        from accelerate.utils import patch_environment
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        from llmlab.runs.signals import handle_signals

        def stop(number: int) -> None:  # as torch does, once it has started processes
            raise SignalException("stopped", signal.Signals(number))

        parsed = self.command(arguments, device, here=True)[1]
        variables = {LAUNCHED: parsed.num_machines, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": TIME_TO_SAVE}
        variables |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"} if parsed.use_cpu else {}
        logging.disable(logging.ERROR)  # what goes wrong is said by the process where it does
        try:
            with handle_signals(stop), patch_environment(**variables):
                launch_command(parsed)
        except ChildFailedError as error:
            first = error.get_first_failure()[1].timestamp
            codes = {rank: failure.exitcode for rank, failure in error.failures.items() if failure.timestamp == first}
            end_as(codes, parsed.num_processes)
        except subprocess.CalledProcessError as error:
            end_as({0: error.returncode}, 1)
        except SignalException as signalled:
            await_children(int(signalled.sigval))
        except (ValueError, OSError) as error:  # of Accelerate's own checks, such as a port in use
            raise UserError(f"--accelerate {self.name}: {reason_of(error)}") from error
        finally:
            logging.disable(logging.NOTSET)

    def run_stage(self, stage: Stage, resolved: Resolved[Any], options: dict[str, Any]) -> None:
        """Runs a stage of a pipeline; what happens in one process alone (merging, sampling) happens in this one."""
        if not stage.resumes:
            return stage.function(resolved, **options)
        job = {
            "stage": stage.name,
            "settings": resolved.settings.model_dump(mode="json", exclude_unset=True),
            "sources": resolved.sources,
            "options": {name: str(value) for name, value in options.items()},
            REMOTE_CODE: remote_code_allowed(),
        }
        with tempfile.TemporaryDirectory(prefix="llmlab-") as folder:
            path = Path(folder) / f"{stage.name}.json"
            path.write_text(json.dumps(job), encoding="utf-8")
            self.run(["run-job", str(path)], resolved.settings.device)


def run_job(path: Path) -> None:
    """Runs the stage that `Launch.run_stage` wrote into a file: what each process of a launched pipeline does."""
    job = read_json(path)
    stage = STAGES[job["stage"]]
    resolved = Resolved(stage.settings_class.model_validate(job["settings"]), job["sources"])
    stage.function(resolved, **job["options"], trust_remote_code=job[REMOTE_CODE])


def read_launch(
    name: str | None, num_processes: int | None, launch_args: str, *, print_launch: bool = False
) -> Launch | None:
    """Returns the launch that a command's options ask for, None where it is to run in this process."""
    if name is None:
        options = {"--num-processes": num_processes, "--launch-args": launch_args, "--print-launch": print_launch}
        if alone := next((option for option, value in options.items() if value), None):
            raise UserError(f"{alone}: it needs --accelerate NAME|FILE beside it")
        return None
    if inside := next((variable for variable in INSIDE if variable in os.environ), None):
        already = f"this is a process of a launch already ({inside} is set); leave --accelerate out"
        raise UserError(f"--accelerate {name}: {already}")
    path = CONFIGS / f"{name}.yaml" if name in NAMES else Path(name)
    if not path.is_file():
        known = ", ".join(NAMES)
        raise UserError(f"--accelerate {name}: expected a file or one of {known}{did_you_mean(name, NAMES)}")
    with reading("--launch-args", "words of a shell"):
        return Launch(name, path, num_processes, tuple(shlex.split(launch_args)))


def without_launch_options(arguments: Sequence[str]) -> list[str]:
    """Returns a command's arguments as they were given, those about the launch left out."""
    left, words = [], iter(arguments)
    for word in words:
        if word in VALUED:
            next(words, None)
        elif word != "--print-launch" and not word.startswith(tuple(f"{option}=" for option in VALUED)):
            left.append(word)
    return left


def end_as(codes: dict[int, int], processes: int) -> None:
    """Ends as the processes did (`codes` of the first to fail, by rank), and says so where one was killed."""
    killed = (item for item in codes.items() if item[1] < 0 and item[1] != -signal.SIGTERM)  # torch's, to the others
    rank, code = next(killed, next(iter(codes.items())))
    if code >= 0:
        raise SystemExit(code)
    killer, advice = signal.Signals(-code).name, "--resume continues from the last checkpoint"
    error = UserError(f"process {rank} of {processes} was killed by {killer} (most often for its memory); {advice}")
    error.exit_code = 128 - code
    raise error


def await_children(number: int) -> None:
    """Passes a signal on to the processes, and every further one, until all have saved and ended; ends as they do."""
    import psutil

    from llmlab.runs.signals import handle_signals

    children = psutil.Process().children()

    def pass_on(number: int) -> None:
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    with handle_signals(pass_on):
        pass_on(number)
        psutil.wait_procs(children)
    raise SystemExit(128 + number)


def _refuse(message: str) -> NoReturn:
    raise UserError(f"--launch-args: {message}")
