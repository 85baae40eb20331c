"""Demands on figures, as a command line states them: "recall@1=0.9"."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from dml.errors import GateNotMet, UsageError
from eval.evaluate import Evaluation


def read_ks(text: str) -> tuple[int, ...]:
    """ "1,2,4,8" as numbers, ascending.

    Raises:
        UsageError: for anything else.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f'--k takes whole numbers from 1 with commas, as in 1,10,100; got "{text}"')
    return tuple(sorted({int(part) for part in parts}))


def read_gates(texts: Sequence[str]) -> dict[str, float]:
    """ "recall@1=0.9" as name and least value.

    Raises:
        UsageError: not NAME=NUMBER, or a number outside [0, 1].
    """
    gates = {}
    for text in texts:
        name, sign, value = text.partition("=")
        try:
            least = float(value)
        except ValueError:
            sign, least = "", 0.0
        if not sign or not 0 <= least <= 1:
            raise UsageError(
                f'--gate takes NAME=NUMBER with a number from 0 to 1, as in recall@1=0.9; got "{text}"'
            )
        gates[name.strip().lower()] = least
    return gates


def check_gates(gates: Mapping[str, float], evaluation: Evaluation) -> None:
    """Pass silently, or say every figure that is too low.

    Raises:
        GateNotMet: a figure is below its gate.
        UsageError: a gate on a figure that was not measured.
    """
    figures = evaluation.metrics.figures() | ({} if evaluation.nmi is None else {"nmi": evaluation.nmi})
    missed = []
    for name, least in gates.items():
        if name not in figures:
            guess = get_close_matches(name, figures, n=1)
            hint = f'Did you mean "{guess[0]}"? ' if guess else ""
            raise UsageError(
                f'--gate: no figure "{name}" was measured. {hint}There are: {", ".join(figures)}.'
            )
        if figures[name] < least:
            missed.append(f"{name} is {figures[name]:.4f}, demanded is at least {least:g}")
    if missed:
        raise GateNotMet("The gate is not met: " + "; ".join(missed) + ".")
