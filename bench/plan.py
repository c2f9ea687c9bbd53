"""What ``python -m bench gpu`` does, most valuable first, and how long that may take.

A block of the plan may begin steps until the sum of the shares so far, so that what one leaves of
its minutes is the next one's, and its first step while the whole has time for it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from bench.cases import GROUPS, Case, Setting, decay_groups
from bench.paths import EXACT, FORMS, HALF_LIFE, STOCK, STOCK_FORMS
from bench.timing import Budget

HALF_LIVES = (HALF_LIFE, 3.0)  # tokens: as at initialisation; as heads learn them
FIRST_STOCK = [path for path in STOCK if path.name != "efficient"]  # the fastest on any new GPU
Groups = Callable[[Setting], list[list[Case]]]

# ---- Estimates, in seconds, of an H200 with 16 cores ---------------------------------------------
ONCE = {"build": 60.0, "tests": 120.0}
PROCESS = 12.0  # a process that imports torch and meets the GPU
TIMING = 4.0  # a group's rounds, what is allocated and freed
CASE = 0.5  # a check and the warm calls of a case whose kernels are compiled
# A case's kernels, compiled: three of Triton's, Inductor's of a layer or of a model, a search.
COMPILE = {"layer": 10.0, "decode": 10.0, "model": 20.0, "tune": 120.0}
COMPILE_ATTENTION = 5.0
COMPILED_MODEL = 60.0


@dataclass(frozen=True)
class Step:
    """A group of cases that take turns, or a block that times nothing (build, tests)."""

    block: str
    section: str  # whose file gets the rows
    share: float  # of the whole run, over when the step's block is
    cases: tuple[Case, ...] = ()
    first: bool = False  # of its block: it may begin past the share, in minutes that are left

    @property
    def title(self) -> str:
        return f"{self.block}: {self.cases[0].shape}" if self.cases else self.block

    def seconds(self, kernels: set[str]) -> float:
        """About how long it takes where ``kernels`` are compiled; it adds its own to them."""
        if not self.cases:
            return ONCE[self.section]
        seconds = TIMING + CASE * len(self.cases)
        for case in self.cases:
            if case.kernels not in kernels:
                seconds += compile_seconds(case)
                kernels.add(case.kernels)
        return seconds


def compile_seconds(case: Case) -> float:
    if case.op == "model" and case.mode == "compiled":
        return COMPILED_MODEL
    return COMPILE.get(case.op, COMPILE_ATTENTION)


# ---- The plan ------------------------------------------------------------------------------------


def smallest(s: Setting) -> Setting:
    """The setting at its first importance width alone."""
    return replace(s, d_states=s.d_states[:1])


def attention(s: Setting) -> list[list[Case]]:
    """The exact kernels beside the best stock ones."""
    return decay_groups("attention", [EXACT, *FIRST_STOCK], s, HALF_LIVES)


def forms(s: Setting) -> list[list[Case]]:
    """Exact attention through stock kernels, where this checkout has it, beside both."""
    if not STOCK_FORMS:
        return []
    return decay_groups("forms", [EXACT, *STOCK_FORMS, *FIRST_STOCK], s, HALF_LIVES)


def first(section: str, count: int) -> Groups:
    """The first groups of a section, at the first importance width."""
    return lambda s: GROUPS[section](smallest(s))[:count]


@dataclass(frozen=True)
class Block:
    """A part of the plan."""

    name: str
    section: str
    share: float  # of the whole run
    groups: Groups | None = None  # None: it times nothing


PLAN = (
    Block("build", "build", 0.2),
    Block("tests", "tests", 0.25),
    Block("attention", "attention", 0.15, attention),
    Block("forms", "forms", 0.1, forms),
    Block("prologue", "prologue", 0.05, first("prologue", 2)),
    Block("training", "model", 0.1, first("model", 1)),
    # The rest, in the order of its value.
    Block("layers", "layer", 0.03, GROUPS["layer"]),
    Block("widths", "attention", 0.05, GROUPS["attention"]),
    Block("stock", "stock", 0.02, GROUPS["stock"]),
    Block("compiled training", "model", 0.02, GROUPS["model"]),
    Block("prologues", "prologue", 0.01, GROUPS["prologue"]),
    Block("decode", "decode", 0.01, GROUPS["decode"]),
    Block("augment", "augment", 0.01, GROUPS["augment"]),
    Block("tune", "tune", 0.01, GROUPS["tune"]),
)
SECTIONS = tuple(dict.fromkeys(block.section for block in PLAN))
ON_REQUEST = ("tune",)  # takes minutes a shape


def missing_forms() -> list[str]:
    """The forms of exact attention that this checkout has no path for."""
    found = {path.name for path in STOCK_FORMS}
    return [name for name in FORMS if name not in found]


def plan(s: Setting, sections: Sequence[str]) -> list[Step]:
    """The steps of these sections, none of them twice; the blocks' shares make up the whole."""
    steps = []
    done: set[tuple[str, str, str, str, str]] = set()
    chosen = [block for block in PLAN if block.section in sections]
    whole = sum(block.share for block in chosen)
    share = 0.0
    for block in chosen:
        share += block.share / whole
        if block.groups is None:
            steps.append(Step(block.name, block.section, share))
            continue
        for group in block.groups(s):
            left = tuple(case for case in group if identity(case) not in done)
            # A rival alone says nothing that is not known.
            if all(case.baseline for case in left):
                continue
            done |= {identity(case) for case in left}
            cases = with_baselines(left, group)
            first = not steps or steps[-1].block != block.name
            steps.append(Step(block.name, block.section, share, cases, first))
    return steps


def identity(case: Case) -> tuple[str, str, str, str, str]:
    return case.op, case.path, case.mode, case.shape, case.passes


def with_baselines(left: Sequence[Case], group: Sequence[Case]) -> tuple[Case, ...]:
    """What is left of a group, and what it is measured against, though timed before."""
    return tuple(case for case in group if case in left or case.baseline)


def estimates(steps: Sequence[Step], seconds: float) -> Iterator[tuple[Step, float, float]]:
    """(Step, about how many minutes it takes, the minute by which it must have begun)."""
    budget = Budget(seconds, begin=0.0)
    for step in steps:
        yield step, step.seconds(budget.kernels) / 60, budget.until(step.share) / 60
