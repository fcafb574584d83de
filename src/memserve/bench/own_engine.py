"""The built-in engine as instances run it, for measurements in this process."""

from __future__ import annotations

from memserve.config import ModelConfig, available_cores
from memserve.engine.batch import BatchLimits
from memserve.engine.engine import EngineSettings
from memserve.engine.model import load_model
from memserve.engine.team import use_one_thread, with_team
from memserve.instance.build import choose_device, wanted_dtype
from memserve.instance.profiling import ProfiledEngine
from memserve.models.resolve import Progress, resolve_model

_MIXED_TOKENS = 256  # unused: these measurements do not mix prefill and decode
_MAX_RUNNING = 64
_BLOCK_TOKENS = 16


def load_own_engine(
    wanted: ModelConfig, threads: int | None, max_batch_tokens: int, progress: Progress
) -> ProfiledEngine:
    """Load a model into an engine. `threads`: None: one for each core.

    Limits PyTorch to one thread for work of the calling thread. Raises ModelError.
    """
    device = choose_device(wanted.device)
    model = resolve_model(wanted, progress)
    threads = threads or available_cores()
    use_one_thread()
    dtype = wanted_dtype(wanted, device)
    progress(f"loading {model.name} as {dtype} on {device}, {threads} threads")
    loaded = with_team(threads, lambda: load_model(model.path, dtype, device))
    limits = BatchLimits(max_batch_tokens, _MIXED_TOKENS, _MAX_RUNNING)
    settings = EngineSettings(model.name, threads, limits, max_waiting=_MAX_RUNNING)
    layout = loaded.layout(model.name, _BLOCK_TOKENS, True, model.identity)
    return ProfiledEngine(loaded, layout, settings, model.path)
