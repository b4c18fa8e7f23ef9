"""Tasks that are solved by keeping a state: at every token, what the tokens so far amount to.

Labels are states, not next tokens. A state is a function of all tokens before it, so that a row of any length asks for
what shorter rows ask for, and more.
"""

import itertools
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from data.synthetic.task import NO_TARGET, refuse_below, refuse_vocabulary

Permutation = tuple[int, ...]


@cache
def permutations(degree: int, even: bool) -> list[Permutation]:
    """All permutations of 0 ... degree - 1, or the even ones, in lexical order: the first is the identity."""
    found = itertools.permutations(range(degree))
    return [p for p in found if not even or sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0]


@cache
def products(degree: int, even: bool) -> list[list[int]]:
    """Entry [a][b] is the number of the permutation "first a, then b"."""
    group = permutations(degree, even)
    number = {permutation: index for index, permutation in enumerate(group)}
    return [[number[tuple(b[image] for image in a)] for b in group] for a in group]


@dataclass(frozen=True, kw_only=True)
class WordProblem:
    """The running product of random elements of a permutation group (Merrill et al., 2024, "The Illusion of State in
    State-Space Models", arXiv 2404.08819): element i is token i, as input and as label."""

    prefix_closed: ClassVar[bool] = True

    degree: ClassVar[int]
    even: ClassVar[bool] = False

    def check(self, sequence_length: int, vocab_size: int) -> None:
        size = len(permutations(self.degree, self.even))
        refuse_vocabulary(vocab_size, size, f"the {size} elements of the group")

    def row(self, generator: np.random.Generator, sequence_length: int, vocab_size: int) -> np.ndarray:
        """Input ids and labels, int64 [2, T]."""
        table = products(self.degree, self.even)
        tokens = generator.integers(len(table), size=sequence_length)
        states = itertools.accumulate(tokens.tolist(), lambda state, token: table[state][token])
        return np.stack([tokens, np.fromiter(states, np.int64, sequence_length)])


@dataclass(frozen=True, kw_only=True)
class Parity(WordProblem):
    """Whether the ones so far are odd: the group of two elements."""

    degree: ClassVar[int] = 2


@dataclass(frozen=True, kw_only=True)
class S3(WordProblem):
    """Products in the group of all 6 permutations of three things, which is solvable."""

    degree: ClassVar[int] = 3


@dataclass(frozen=True, kw_only=True)
class A5(WordProblem):
    """Products in the group of the 60 even permutations of five things, the smallest that is not solvable."""

    degree: ClassVar[int] = 5
    even: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class S5(WordProblem):
    """Products in the group of all 120 permutations of five things."""

    degree: ClassVar[int] = 5


@dataclass(frozen=True, kw_only=True)
class ModularArithmetic:
    """`3 + 2 * 4 - ...`, products first: at every number, the value so far modulo `modulus` (Delétang et al., 2022,
    "Neural Networks and the Chomsky Hierarchy", arXiv 2207.02098).

    Tokens 0 to modulus - 1 are numbers, as input and as label, the next three are plus, minus and times.
    """

    prefix_closed: ClassVar[bool] = True

    modulus: int = 5

    def check(self, sequence_length: int, vocab_size: int) -> None:
        refuse_below(2, modulus=self.modulus)
        refuse_vocabulary(vocab_size, self.modulus + 3, "the numbers and three operators")

    def row(self, generator: np.random.Generator, sequence_length: int, vocab_size: int) -> np.ndarray:
        """Input ids and labels, int64 [2, T]."""
        count = -(-sequence_length // 2)
        numbers = generator.integers(self.modulus, size=count)
        operators = generator.integers(3, size=count)  # entry i stands after number i
        tokens = np.stack([numbers, self.modulus + operators], axis=1).ravel()[:sequence_length]
        values = []
        total, term = 0, int(numbers[0])  # what can no longer change, and what a product would still change
        for index, number in enumerate(numbers.tolist()):
            if index and operators[index - 1] == 2:
                term = term * number % self.modulus
            elif index:
                total, term = (total + term) % self.modulus, number if operators[index - 1] == 0 else -number
            values.append((total + term) % self.modulus)
        labels = np.full(2 * count, NO_TARGET)
        labels[::2] = values
        return np.stack([tokens, labels[:sequence_length]])


@dataclass(frozen=True, kw_only=True)
class Dyck:
    """Nested brackets: at every token, the bracket that would close the innermost open one, or that none is open.

    Tokens 0 to kinds - 1 open, kinds to 2 kinds - 1 close, and the label 2 kinds says that none is open. Where both may
    come, a bracket opens with probability 1/2.

    Attributes:
        kinds: of brackets.
        depth: open at once at most (Hewitt et al., 2020, arXiv 2010.07515).
    """

    prefix_closed: ClassVar[bool] = True

    kinds: int = 2
    depth: int = 4

    def check(self, sequence_length: int, vocab_size: int) -> None:
        refuse_below(1, kinds=self.kinds, depth=self.depth)
        refuse_vocabulary(vocab_size, 2 * self.kinds + 1, f"{self.kinds} kinds of brackets and the label for none")

    def row(self, generator: np.random.Generator, sequence_length: int, vocab_size: int) -> np.ndarray:
        """Input ids and labels, int64 [2, T]."""
        kinds = generator.integers(self.kinds, size=sequence_length).tolist()
        rises = generator.integers(2, size=sequence_length).tolist()
        tokens, labels = [], []
        stack: list[int] = []
        for kind, rise in zip(kinds, rises):
            if not stack or (rise and len(stack) < self.depth):
                stack.append(kind)
                tokens.append(kind)
            else:
                tokens.append(self.kinds + stack.pop())
            labels.append(self.kinds + stack[-1] if stack else 2 * self.kinds)
        return np.array([tokens, labels], dtype=np.int64)
