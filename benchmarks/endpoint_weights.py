"""How much each weight of the loss makes of an error of the endpoint, in closed form.

    python -m benchmarks.endpoint_weights

prints the tables of "Weights of the loss" in `docs/beyond.md`. Data are Gaussian with a standard
deviation `s` in each direction. The endpoint is wrong by one unit in one direction, and the path to
it is otherwise the flow's. Then the velocity's error at a state of the student's own path is
`t / var(t)` with `var(t) = ((1 - t) s)^2 + t^2`; a loss with the weight `t^q` has its square.
"""

import numpy as np
import scipy.integrate

from piflow_jax.data import Source, load_digits_source, load_fashion_mnist_source

SPREADS = (1.0, 0.3, 0.1, 0.03, 0.01)
POWERS = (0, 1, 2)
# Directions that hold the last part of the data's variance.
LAST = 0.01


def propagator(t: np.ndarray, s: float) -> np.ndarray:
    """Change of the endpoint per change of the state at `t`, in a direction with deviation `s`."""
    return s / np.sqrt(np.square((1 - t) * s) + np.square(t))


def velocity_error(t: np.ndarray, s: float) -> np.ndarray:
    """Error of the velocity at `t` of a student whose endpoint is wrong by one."""
    return t / (np.square((1 - t) * s) + np.square(t))


def counted(s: float, power: float) -> float:
    """What the loss with the weight `t^power` makes of an endpoint that is wrong by one."""
    value, _ = scipy.integrate.quad(
        lambda t: t**power * velocity_error(t, s) ** 2, 0, 1, points=[min(s, 0.5)], limit=200
    )
    return value


def density_moment(s: float, power: int) -> float:
    """Second moment of the gradient with states of density `t^power`, relative to the weight's.

    A state's gradient is taken to be as large as its error of the velocity.
    """
    return counted(s, power) / (power + 1) / counted(s, 2 * power)


def spreads(source: Source) -> np.ndarray:
    """Standard deviations of a data set along its principal components, largest first."""
    x = np.asarray(source.x, np.float64).reshape(len(source), -1)
    values = np.linalg.eigvalsh(np.cov(x.T))[::-1]
    return np.sqrt(values[values > 1e-6 * values[0]])


def last_share(s: np.ndarray, power: float) -> tuple[float, float]:
    """Share of directions that hold the last of the variance, and their share of the loss.

    Endpoints are equally wrong in all directions.
    """
    held = np.cumsum(np.square(s)) / np.sum(np.square(s))
    last = held > 1 - LAST
    weights = np.array([counted(one, power) for one in s])
    return float(np.mean(last)), float(weights[last].sum() / weights.sum())


def spread_table() -> list[str]:
    """Lines of the table by deviation, relative to a direction with deviation 1."""
    head = ["deviation s", *(f"weight $t^{power}$" for power in POWERS)]
    head += [f"density $t^{power}$, second moment" for power in POWERS[1:]]
    lines = [f"| {' | '.join(head)} |", f"|{' ---: |' * len(head)}"]
    for s in SPREADS:
        cells = [f"{counted(s, power) / counted(1.0, power):.2f}" for power in POWERS]
        cells += [f"{density_moment(s, power):.2f}" for power in POWERS[1:]]
        lines.append(f"| {s:g} | {' | '.join(cells)} |")
    return lines


def data_table(sources: dict[str, Source]) -> list[str]:
    """Lines of the table by data set."""
    head = ["pixels of", "largest s", "median s", "directions with the last 1% of the variance"]
    head += [f"their share with $t^{power}$" for power in POWERS]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for name, source in sources.items():
        s = spreads(source)
        shares = [last_share(s, power) for power in POWERS]
        cells = [f"{s[0]:.2f}", f"{np.median(s):.3f}", f"{shares[0][0]:.0%}"]
        cells += [f"{share:.0%}" for _, share in shares]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Prints both tables."""
    sources = {"the digits": load_digits_source(), "Fashion-MNIST": load_fashion_mnist_source(None)}
    print("\n".join([*spread_table(), "", *data_table(sources)]))


if __name__ == "__main__":
    main()
