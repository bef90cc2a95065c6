"""Address problems for tests and benchmarks: a training step in the shape of a transformer's, and steps without a byte to spare."""

from __future__ import annotations

import random

from memory_mgmt.address_problem import Lifetime

UNIT = 512  # bytes: what CUDA's caching allocator rounds to


def training_step(layers: int, *, recompute: bool = False, seed: int = 0) -> list[Lifetime]:
    """About 125 buffers per layer: parameters and their states, skeletal activations, and the transients of both passes as groups.

    Sizes are those of a Llama block in units of tokens x width (16_000 for a hidden state, 43_000 in the MLP), with small ones between.
    When which transient is freed is random, but equal in all layers. With ``recompute`` a layer keeps its input only, and its backward
    pass begins with its forward pass.
    """
    step = _Step(seed)
    inputs, kept = [], []
    for layer in range(layers):
        inputs.append(step.begin(16_000))
        kept.append([] if recompute else step.skeletal())
        step.transients(f"forward.{layer}", 40)
    for _ in range(6):  # head and loss
        step.short(None, 125_000)
    for layer in reversed(range(layers)):
        activations = kept[layer]
        if recompute:
            activations = step.skeletal()
            step.transients(f"recompute.{layer}", 40)
        gradients = [step.begin(size) for size in (16_000, 43_000)]
        step.transients(f"backward.{layer}", 52, frees=[*activations, *gradients])
        step.end(inputs[layer])
    return step.out + [Lifetime(f"state{k}", 0, step.now + 1, 16_384 * UNIT) for k in range(10 * layers)]


class _Step:
    """Writes down lives as time goes by."""

    def __init__(self, seed: int) -> None:
        self.seed, self.now = seed, 1
        self.out: list[Lifetime] = []

    def begin(self, units: int) -> tuple[int, int]:
        self.now += 1
        return self.now, units * UNIT

    def end(self, begun: tuple[int, int], group: str | None = None) -> None:
        self.now += 1
        self.out.append(Lifetime(len(self.out), begun[0], self.now, begun[1], group))

    def short(self, group: str | None, units: int) -> None:
        begun = self.begin(units)
        self.end(begun, group)

    def skeletal(self) -> list[tuple[int, int]]:
        """What one layer keeps for its backward pass: q, k, v, attention output, lse, norms, gate, up, product, ..."""
        return [self.begin(units) for units in (16_000, 16_000, 4_000, 4_000, 16_000, 256, 16, 16_000, 16, 43_000, 43_000, 43_000, 16_000)]

    def transients(self, group: str, number: int, frees: list[tuple[int, int]] | None = None) -> None:
        """Buffers of which up to five are alive at once; in between, what is no longer needed is freed."""
        chance = random.Random(f"{self.seed} {group.partition('.')[0]}")
        alive: list[tuple[int, int]] = []
        waiting = list(frees or [])
        for k in range(number):
            alive.append(self.begin(chance.choice([16_000, 16_000, 16_000, 32_000, 43_000, 4_000, 256, 16, 1])))
            if len(alive) == 5 or chance.random() < 0.4:
                self.end(alive.pop(chance.randrange(len(alive))), group)
            if waiting and k % 3 == 2:
                self.end(waiting.pop(0))
        for begun in alive:
            self.end(begun, group)
        for begun in waiting:
            self.end(begun)


def cut_rectangle(pieces: int, *, span: int = 1000, height: int = 1000, seed: int = 0) -> list[Lifetime]:
    """A rectangle of time and memory cut at random: a plan as high as its lower bound exists, and greedy plans seldom find it."""
    chance = random.Random(seed)
    whole = [(0, span, 0, height)]
    while len(whole) < pieces:
        t0, t1, b0, b1 = whole.pop(chance.randrange(len(whole)))
        if chance.random() < 0.5 and t1 - t0 > 1:
            cut = chance.randrange(t0 + 1, t1)
            whole += [(t0, cut, b0, b1), (cut, t1, b0, b1)]
        elif b1 - b0 > 1:
            cut = chance.randrange(b0 + 1, b1)
            whole += [(t0, t1, b0, cut), (t0, t1, cut, b1)]
        else:
            whole.append((t0, t1, b0, b1))
    return [Lifetime(k, t0, t1, b1 - b0) for k, (t0, t1, b0, b1) in enumerate(whole)]


def full_house(buffers: int, *, live: int, seed: int = 0) -> list[Lifetime]:
    """A step in which exactly ``live`` bytes are alive at all times: at each, one or two buffers end and others of their total begin.

    About one in a hundred with 12 to 20 buffers has no plan as low as its live bytes: they prove that a search can prove that.
    """
    chance = random.Random(seed)

    def parts(total: int) -> list[int]:
        out = []
        while total:
            out.append(chance.randint(1, total))
            total -= out[-1]
        return out

    now, alive, lives = 0, [(0, size) for size in parts(live)], []
    while len(lives) + len(alive) < buffers:
        now += 1
        ending = chance.sample(alive, min(len(alive), chance.randint(1, 2)))
        for buffer in ending:
            alive.remove(buffer)
            lives.append((buffer[0], now, buffer[1]))
        alive += [(now, size) for size in parts(sum(size for _, size in ending))]
    lives += [(begin, now + 1, size) for begin, size in alive]
    return [Lifetime(k, *life) for k, life in enumerate(lives)]
