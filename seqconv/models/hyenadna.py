"""HyenaDNA: a language model of nucleotides, blocks of Hyena and a network (arXiv 2306.15794)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqconv.layers.hyena import Hyena
from seqconv.layers.state import State, States
from seqconv.ops.checks import check_flag, check_positive, check_shape, check_tensor

SPECIAL = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")


class CharacterTokenizer:
    """Characters to the numbers that HyenaDNA was trained with, and back.

    [CLS], [SEP], [BOS], [MASK], [PAD], [RESERVED] and [UNK] are 0 to 6. The characters follow from 7 on, by default A,
    C, G, T and N. Every other character, lower case too, is [UNK].

    Example:
        >>> CharacterTokenizer().encode("ACGTx")
        [7, 8, 9, 10, 6]
        >>> CharacterTokenizer().decode([7, 10, 1])
        'AT[SEP]'
    """

    def __init__(self, characters: str = "ACGTN"):
        self.tokens = (*SPECIAL, *characters)
        if len(set(self.tokens)) < len(self.tokens):
            raise ValueError(
                f"CharacterTokenizer: characters must be different, got {characters!r}"
            )
        self.numbers = {token: i for i, token in enumerate(self.tokens)}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The number of each character. special puts [CLS] before them and [SEP] after them."""
        unknown = self.numbers["[UNK]"]
        found = [self.numbers.get(character, unknown) for character in text]
        return [self.numbers["[CLS]"], *found, self.numbers["[SEP]"]] if special else found

    def decode(self, numbers) -> str:
        """The tokens with these numbers, special ones in brackets."""
        wanted = f"numbers must be 0 ... {len(self.tokens) - 1}"
        for number in numbers:
            if not 0 <= number < len(self.tokens):
                raise ValueError(f"CharacterTokenizer: {wanted}, got {int(number)}")
        return "".join(self.tokens[number] for number in numbers)


class Block(nn.Module):
    """h, r -> r' = r + h; r'' = r' + mixer(norm_1(r')); (network(norm_2(r'')), r''), where r is the sum so far."""

    def __init__(self, mixer: Hyena, d_inner: int, epsilon: float, wide_sum: bool):
        super().__init__()
        d_model = mixer.d_model
        self.mixer = mixer
        self.norms = nn.ModuleList(nn.LayerNorm(d_model, eps=epsilon) for _ in range(2))
        self.network = nn.ModuleList([nn.Linear(d_model, d_inner), nn.Linear(d_inner, d_model)])
        self.dropouts = nn.ModuleList(nn.Dropout(0.0) for _ in range(2))
        self.wide_sum = wide_sum

    def forward(self, h: Tensor, total: Tensor | None, mix) -> tuple[Tensor, Tensor]:
        """mix is what maps the mixer's input to its output."""
        x, total = self._norm(0, h, total)
        x, total = self._norm(1, mix(x), total)
        first, second = self.network
        return second(F.gelu(first(x), approximate="tanh")), total

    def _norm(self, i: int, h: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.dropouts[i](h)
        total = h if total is None else h + total
        x = self.norms[i](total.to(self.norms[i].weight.dtype))  # pyright: ignore
        return x, total.float() if self.wide_sum and total.dtype != torch.float64 else total


class HyenaDNA(nn.Module):
    """Tokens to the logits of the next one: an embedding, blocks, a norm and a linear map.

        x <- x + hyena(norm(x)); x <- x + W_2 gelu(W_1 norm(x) + b_1) + b_2 in each block, with GELU's tanh form

    seqconv.convert.load_hyenadna makes one of a published checkpoint. Tokens are those of CharacterTokenizer.

    Args:
        mixers: the Hyena of each block.
        vocab: the number of tokens. 16 are CharacterTokenizer's 12 and 4 which nothing means.
        d_inner: the width of the network, by default 4 d_model.
        tied: whether the last map has the embedding's weight.
        epsilon, last_epsilon: what the norms of the blocks and the last one add to the variance.
        wide_sum: whether the sum x stays float32 in a half-precision model.
        embed_dropout, resid_dropout: of the embedding, and of what is added to x.

    Source: arXiv 2306.15794. Example:
        >>> from seqconv import Hyena
        >>> model = HyenaDNA([Hyena(8, l_max=100) for _ in range(2)]).eval()
        >>> tokens = torch.tensor([CharacterTokenizer().encode("ACGT")])
        >>> model(tokens).shape, model.generate(tokens, 5).shape
        (torch.Size([1, 4, 16]), torch.Size([1, 5]))
    """

    def __init__(
        self,
        mixers: Sequence[Hyena],
        *,
        vocab: int = 16,
        d_inner: int | None = None,
        tied: bool = True,
        epsilon: float = 1e-5,
        last_epsilon: float = 1e-5,
        wide_sum: bool = True,
        embed_dropout: float = 0.0,
        resid_dropout: float = 0.0,
    ):
        super().__init__()
        mixers = list(mixers)
        widths = sorted({mixer.d_model for mixer in mixers})
        if len(widths) != 1:
            raise ValueError(f"HyenaDNA: mixers must have one d_model, got {widths}")
        d_inner = 4 * widths[0] if d_inner is None else d_inner
        check_positive("HyenaDNA", vocab=vocab, d_inner=d_inner)
        check_flag("HyenaDNA", tied=tied, wide_sum=wide_sum)
        self.d_model, self.vocab = widths[0], vocab
        self.embedding = nn.Embedding(vocab, self.d_model)
        self.blocks = nn.ModuleList(Block(m, d_inner, epsilon, wide_sum) for m in mixers)
        self.dropout = nn.Dropout(resid_dropout)
        self.norm = nn.LayerNorm(self.d_model, eps=last_epsilon)
        self.head = nn.Linear(self.d_model, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        for i, block in enumerate(self._blocks()):
            for j, dropout in enumerate(block.dropouts):
                dropout.p = embed_dropout if i == j == 0 else resid_dropout  # pyright: ignore
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the embedding, the head and the networks' weights as N(0, 0.02), with biases 0. The mixers draw their
        own parameters."""
        linears = [linear for block in self._blocks() for linear in block.network]
        for module in (self.embedding, self.head, *linears):
            nn.init.normal_(module.weight, std=0.02)  # pyright: ignore
        for linear in linears:
            nn.init.zeros_(linear.bias)  # pyright: ignore

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # pyright: ignore

    def _run(self, tokens: Tensor, mixes) -> Tensor:
        h, total = self.embedding(tokens), None
        for block, mix in zip(self._blocks(), mixes, strict=True):
            h, total = block(h, total, mix)
        h = self.dropout(h)
        total = h if total is None else h + total
        return self.norm(total.to(self.norm.weight.dtype))

    def _check(self, function: str, tokens: Tensor, axes: int) -> None:
        check_tensor(function, "tokens", tokens, dtypes=(torch.int64, torch.int32))
        check_shape(function, "tokens", tokens, (("batch", None), ("length", None))[:axes])

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens (batch, length) -> what the last map sees, (batch, length, d_model): embeddings of a sequence."""
        self._check("HyenaDNA", tokens, 2)
        return self._run(tokens, [block.mixer for block in self._blocks()])

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, length) -> logits of the next token, (batch, length, vocab)."""
        return self.head(self.hidden(tokens))

    def init_state(self, batch: int, *, length: int | None = None, spread: bool = False) -> States:
        """The states of all mixers before any token. length and spread are as in Hyena.init_state."""
        options = {"length": length, "spread": spread}
        return States(block.mixer.init_state(batch, **options) for block in self._blocks())

    def prefill(self, tokens: Tensor, state: States) -> tuple[Tensor, States]:
        """tokens (batch, length), which follow those that led to `state`, to logits (batch, length, vocab) and the
        state after them, a new one."""
        self._check("HyenaDNA.prefill", tokens, 2)
        logits, after = self._through("prefill", tokens, state)
        return logits, States(after)

    def step(self, tokens: Tensor, state: States) -> tuple[Tensor, States]:
        """tokens (batch,) to logits (batch, vocab), and the state, which it changes in place. It has no gradient."""
        self._check("HyenaDNA.step", tokens, 1)
        logits, after = self._through("step", tokens, state)
        if any(new is not part for new, part in zip(after, state, strict=True)):
            state = States(after)  # In an exported program a step makes new states.
        return logits, state

    def _through(self, method: str, tokens: Tensor, state: States) -> tuple[Tensor, list[State]]:
        """The logits by this method of the mixers, and the states that it returns."""
        after: list[State] = []

        def mix(block: Block, part: State):
            def call(x: Tensor) -> Tensor:
                y, new = getattr(block.mixer, method)(x, part)
                after.append(new)
                return y

            return call

        y = self._run(tokens, [mix(*pair) for pair in zip(self._blocks(), state, strict=True)])
        return self.head(y), after

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        steps: int,
        *,
        temperature: float = 0.0,
        among: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The next tokens after tokens (batch, length), (batch, steps): the likeliest ones, or with a temperature drawn
        from softmax(logits / temperature). among are the tokens that may come, by default all. A step takes what
        Hyena.step takes, whatever the length. Dropout is as the model is: call eval() before."""
        self._check("HyenaDNA.generate", tokens, 2)
        if not isinstance(steps, int) or steps < 0 or tokens.shape[1] == 0:
            wanted = "steps must be an integer >= 0, and tokens not empty"
            raise ValueError(
                f"HyenaDNA.generate: {wanted}, got {steps!r} and {tuple(tokens.shape)}"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab:
            found = f"from {int(tokens.min())} to {int(tokens.max())}"
            wanted = f"tokens must be >= 0 and below {self.vocab}"
            raise ValueError(f"HyenaDNA.generate: {wanted}, got {found}")
        among = None if among is None else list(among)
        if among is not None and not all(0 <= token < self.vocab for token in among):
            wanted = f"among must be >= 0 and below {self.vocab}"
            raise ValueError(f"HyenaDNA.generate: {wanted}, got {among}")
        if not temperature >= 0:
            raise ValueError(f"HyenaDNA.generate: temperature must be >= 0, got {temperature}")
        refused = torch.zeros(self.vocab, dtype=torch.bool, device=tokens.device)
        if among is not None:
            refused[:] = True
            refused[torch.as_tensor(among, device=tokens.device)] = False
        batch, length = tokens.shape
        logits, state = self.prefill(tokens, self.init_state(batch, length=length + steps))
        logits, found = logits[:, -1], []
        for i in range(steps):
            logits = logits.float().masked_fill(refused, -torch.inf)
            if temperature == 0:
                found.append(logits.argmax(-1))
            else:
                share = (logits / temperature).softmax(-1)
                found.append(torch.multinomial(share, 1, generator=generator).squeeze(-1))
            if i < steps - 1:
                logits, state = self.step(found[-1], state)
        return torch.stack(found, 1) if found else tokens.new_empty(batch, 0)
