"""What is compared: a spec on the command line becomes a named variant with its place on the road."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from mpa_edge.bundle import FULL_PRECISION, MANIFEST, read_bundle, sha256_of
from mpa_edge.chat_address import is_address, parse_spec
from mpa_edge.digests import digest_of_adapter, digest_of_folder
from mpa_edge.errors import InputError
from mpa_edge.fake import PREFIX as FAKE
from mpa_edge.models import ADAPTER, base_of

# The road, in order. A bundle at full precision shows what conversion costs, a quantized one what quantization costs.
Step = Literal["teacher", "student", "aligned", "merged", "full", "quantized", "other"]
STEPS: tuple[Step, ...] = ("teacher", "student", "aligned", "merged", "full", "quantized", "other")
BASELINE_ROLES = ("teacher", "student", "aligned", "merged")


@dataclass(frozen=True)
class Variant:
    """One model as the report shows it. `role` is the schema's: merged weights are the aligned model, too."""

    name: str
    spec: str
    step: Step
    engine: str
    quantization: str | None = None
    threads: int | None = None  # None: as many as the others
    sweep_of: str | None = None  # the variant that this one is with another number of threads

    @property
    def role(self) -> str | None:
        """teacher, student, aligned, bundle, or None for a model that nobody gave a role."""
        if self.step in ("full", "quantized"):
            return "bundle"
        return {"merged": "aligned", "other": None}.get(self.step, self.step)


def variants_of(bundles: Sequence[str], baselines: Sequence[str]) -> list[Variant]:
    """The variants in the road's order, with unique names. `InputError` for a path that is no bundle or model."""
    found = [*map(baseline_of, baselines), *map(bundle_of, bundles)]
    if not found:
        raise InputError("nothing to measure: name a bundle, or a model with --baseline")
    repeated = {name for name, times in Counter(variant.name for variant in found).items() if times > 1}
    seen: Counter[str] = Counter()
    unique = []
    for variant in found:
        seen[variant.name] += 1
        again = variant.name in repeated and seen[variant.name] > 1
        unique.append(replace(variant, name=f"{variant.name}-{seen[variant.name]}") if again else variant)
    engines = list(dict.fromkeys(variant.engine for variant in unique if variant.role == "bundle"))
    return sorted(unique, key=lambda variant: place_on_road(variant, engines))


def swept(variants: Sequence[Variant], counts: Sequence[int]) -> list[Variant]:
    """Each bundle with every number of threads; the largest goes without a mark, and the others follow it."""
    found = []
    for variant in variants:
        found.append(variant)
        if variant.role == "bundle":
            found += [
                replace(variant, name=f"{variant.name}@{count}", threads=count, sweep_of=variant.name)
                for count in sorted(set(counts), reverse=True)[1:]
            ]
    return found


def place_on_road(variant: Variant, engines: Sequence[str]) -> tuple[int, int, int]:
    """Sorts by the road; bundles by engine first, so that what is quantized follows what it was made from."""
    step = STEPS.index(variant.step)
    if variant.role == "bundle":
        return (STEPS.index("full"), engines.index(variant.engine), step)
    return (step, 0, 0)


def baseline_of(text: str) -> Variant:
    """The variant of `role=spec` or `spec`: a folder, a hub id, a chat server, or a fake."""
    role, equals, spec = text.partition("=")
    if not equals or role not in BASELINE_ROLES:
        role, spec = "other", text
    folder = Path(spec)
    if folder.joinpath(MANIFEST).is_file():
        variant = bundle_of(spec)
        return variant if role == "other" else replace(variant, name=role, step=cast("Step", role))
    if is_address(spec):
        url, model = parse_spec(spec)
        return Variant((model or url).rsplit("/", 1)[-1] if role == "other" else role, spec, cast("Step", role), "chat")
    looks_like_path = spec.startswith((".", "/", "~")) or folder.exists()
    if looks_like_path and not any(folder.joinpath(name).is_file() for name in ("config.json", ADAPTER)):
        raise InputError(f"--baseline {text}: {spec} is no model folder (neither config.json nor {ADAPTER} is there)")
    adapter_base(folder)  # an adapter without its base is told now, not after the others were measured
    name = folder.name if role == "other" else role
    engine = "fake" if spec.startswith(FAKE) else "transformers"
    return Variant(name or spec, spec, role, engine)  # type: ignore[arg-type]


def bundle_of(spec: str) -> Variant:
    """The variant of an exported bundle's folder; raises `BundleError` for a damaged one."""
    if spec.startswith(FAKE):
        return Variant("fake", spec, "full", "fake")
    bundle = read_bundle(Path(spec))
    return Variant(bundle.short_name, spec, bundle_step(bundle.quantization), bundle.engine, bundle.quantization)


def bundle_step(quantization: str) -> Step:
    """Whether a bundle's weights are as trained, up to 16 bit."""
    return "full" if quantization.lower() in FULL_PRECISION else "quantized"


def size_bytes(spec: str) -> int | None:
    """What the weights take on disk, an adapter's base included; a bundle's engine files; None where unknown."""
    folder = local_folder(spec)
    if folder is None:
        return None
    if (folder / MANIFEST).is_file():
        return read_bundle(folder).size_bytes()
    weights = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    base = adapter_base(folder)
    return weights + (size_bytes(base) or 0 if base else 0)


def content_digest(spec: str) -> str | None:
    """Names the content of a local model, an adapter's base included; None where only the opened model can tell."""
    folder = Path(spec)
    if not folder.is_dir():
        return None
    if (folder / MANIFEST).is_file():
        return sha256_of(folder / MANIFEST)  # it holds the digests of all other files
    base = adapter_base(folder)
    if base is None:
        return digest_of_folder(folder)
    return hashlib.sha256(f"{digest_of_adapter(folder)} {content_digest(base) or base}".encode()).hexdigest()


def adapter_base(folder: Path) -> str | None:
    """The model that an adapter folder was trained on; None for a whole model."""
    return base_of(folder) if (folder / ADAPTER).is_file() else None


def local_folder(spec: str) -> Path | None:
    """Where a model lies: a folder, or the hub cache's copy of a hub id; None where it is not on this disk."""
    if Path(spec).is_dir():
        return Path(spec)
    if spec.startswith(FAKE) or "://" in spec:
        return None
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(spec, local_files_only=True))
    except Exception:
        return None
