"""`--dry-run --devices 64 --device h100`: what a run would take on GPUs that are not here, and which mesh is the fastest that fits."""

from smedjan_common.errors import ConfigError, OutOfMemoryError, flag
from smedjan_common.reporting.console import count, duration, flop, size
from smedjan_common.reporting.table import Line, as_table
from smedjan_common.run.asked import Asked
from smedjan_common.run.decided import Decided, teacher_line
from smedjan_common.run.teacher import model_of
from smedjan_common.training.cluster import (
    LINK_SHARE,
    NETWORK_SHARE,
    USABLE,
    Cluster,
    Cost,
    cost,
    costs,
    fits,
    hardware,
)
from smedjan_common.training.memory import state_bytes

ONLY_WITH = ("device", "devices_per_host", "network_gbits")
OTHERS = 3  # meshes that are shown beside the one that is taken


def check_cluster(asked: Asked, backend: str) -> None:
    """Raises ConfigError for --devices without --dry-run, for flags of it by themselves, and for numbers that no cluster has."""
    if asked.value("devices") is None:
        if alone := next((name for name in ONLY_WITH if asked.is_given(name)), None):
            raise ConfigError(
                f"{flag(alone)} says nothing by itself.", "It is for --dry-run --devices N.", f"Add --devices, or leave {flag(alone)} out."
            )
        return
    if not asked.value("dry_run"):
        why = "A run takes the devices that are there, as --mesh says."
        raise ConfigError("--devices is for a dry run.", why, "Add --dry-run to plan, or leave --devices out to train.")
    if backend != "jax":
        raise ConfigError(f"--devices is not for the backend {backend}.", "The plan is one of GPUs with JAX.", "Add --backend jax.")
    hardware(asked.value("device"))
    for name in ("devices", "devices_per_host", "network_gbits"):
        if (value := asked.value(name)) <= 0:
            raise ConfigError(f"{flag(name)} is {value:g}.", "It must be more than 0.", f"Give {flag(name)} another value.")
    devices, each = asked.value("devices"), asked.value("devices_per_host")
    if devices > each and devices % each:
        why = f"Hosts have {each} each (--devices-per-host)."
        raise ConfigError(
            f"--devices {devices} do not fill their hosts.", why, f"Take {devices // each * each} or {(devices // each + 1) * each}."
        )


def cluster_plan(decided: Decided) -> str:
    """The plan. Raises OutOfMemoryError where no mesh fits, ConfigError where none can share the run out."""
    asked, model, train = decided.asked, decided.model, decided.train
    cluster = Cluster(
        hardware(asked.value("device")), asked.value("devices"), asked.value("devices_per_host"), asked.value("network_gbits") * 1e9 / 8
    )
    teacher = model_of(decided.teacher)
    found = [cost(model, train, decided.mesh, cluster, teacher)] if decided.mesh else costs(model, train, cluster, teacher)
    if decided.mesh and decided.mesh.size != cluster.devices:
        what = f"--mesh {decided.mesh} takes {decided.mesh.size} devices."
        raise ConfigError(what, f"--devices says {cluster.devices}.", "Leave --mesh out to see the fastest.")
    if not found:
        raise ConfigError(
            f"No mesh of {cluster.devices} devices shares out --batch-size {train.batch_size}.",
            "Every device gets the same number of sequences, and the same part of heads and width.",
            f"Take a multiple of {cluster.devices} for --batch-size.",
        )
    best = found[0]
    if not fits(best, cluster) and not asked.value("force"):
        least = min(found, key=lambda one: one.needed)
        raise OutOfMemoryError(
            f"The run needs about {size(least.needed)} of memory on each device, and {size(_usable(cluster))} are there.",
            f"{least.mesh} needs the least of all meshes of {cluster.devices} {cluster.hardware.name.upper()}.",
            "Take more --devices, --gradient-checkpointing full, a higher --grad-accum or a smaller --batch-size; --force plans it so.",
        )
    lines = [*_where(decided, cluster), *_costs(decided, best, cluster), ("why", _why(best, found, cluster, bool(decided.mesh)))]
    others = [("beside it" if not number else "", _short(one, cluster)) for number, one in enumerate(found[1 : 1 + OTHERS])]
    return f"{as_table([*lines, *others])}\nDry run: nothing was written, and no device was asked."


def _where(decided: Decided, cluster: Cluster) -> list[Line]:
    row, model, train = cluster.hardware, decided.model, decided.train
    hosts = -(-cluster.devices // cluster.per_host)
    spread = f" on {hosts} hosts, {8 * cluster.network / 1e9:g} Gbit/s each between them" if hosts > 1 else " on one host"
    shape = f"dim {model.dim}, {model.layers} layers, {model.heads} heads, vocabulary {model.vocab_size}"
    return [
        ("devices", f"{cluster.devices} x {row.name.upper()}{spread}, {train.dtype}"),
        ("model", f"{count(model.num_params())} parameters: {shape}"),
        *teacher_line(decided),
        ("training", f"{f'{train.steps} ' if decided.known_steps else ''}steps of {train.batch_size} x {train.seq_len}, {train.optimizer}"),
    ]


def _costs(decided: Decided, best: Cost, cluster: Cluster) -> list[Line]:
    model, train = decided.model, decided.train
    rate = best.tokens_per_second / cluster.devices
    reached = rate * decided.flops_per_token
    parts = [
        (
            "" if number else "traffic",
            f"{axis}: {size(best.traffic[axis].bytes)} a device and step at {size(cluster.bandwidth(best.mesh, axis))}/s,"
            f" {1e3 * seconds:.3g} ms",
        )
        for number, (axis, seconds) in enumerate(best.sending.items())
    ]
    step = f"{1e3 * best.seconds:.4g} ms, {1e3 * best.compute:.4g} of them computing"
    speed = f"{count(best.tokens_per_second)} tokens/s, {count(rate)} a device ({flop(reached)}/s)"
    left = max(0, train.steps - (decided.start.step if decided.start else 0)) * best.seconds
    time = f"about {duration(left)} for the steps" if decided.known_steps else "not known before tokenising"
    return [
        ("mesh", str(best.mesh)),
        ("memory", f"about {size(best.needed)} on each device, {size(_usable(cluster))} there"),
        ("", f"{size(state_bytes(model, train, best.mesh))} of it parameters and optimizer"),
        *(parts or [("traffic", "none")]),
        ("step", step),
        ("speed", speed),
        ("time", time),
        ("from", _source(cluster)),
    ]


def _source(cluster: Cluster) -> str:
    row = cluster.hardware
    own = (
        f"steps measured on an {row.name.upper()}"
        if row.measured
        else f"the share of its peak that an H100 reaches: no {row.name.upper()} was measured"
    )
    links = f"{100 * LINK_SHARE:.0f} % of {row.link / 1e9:g} GB/s inside a host, measured on H200"
    between = f", {100 * NETWORK_SHARE:.0f} % of the network between hosts, assumed" if cluster.devices > cluster.per_host else ""
    return f"{own}; {links}{between} (docs/scale.md)"


def _why(best: Cost, found: list[Cost], cluster: Cluster, given: bool) -> str:
    if given:
        return "--mesh says so"
    small = sum(not fits(one, cluster) for one in found)
    out = f"; {small} of {len(found)} meshes need more memory than there is" if small else ""
    return f"the fastest by estimate of the {len(found) - small} that fit{out}"


def _short(one: Cost, cluster: Cluster) -> str:
    room = "" if fits(one, cluster) else ", too much"
    return f"{one.mesh}: {count(one.tokens_per_second)} tokens/s, {size(one.needed)} a device{room}"


def _usable(cluster: Cluster) -> float:
    return USABLE * cluster.hardware.memory
