"""The Decision Transformer over transformers' own GPT-2 or ImageGPT blocks."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2Config, GPT2Model, ImageGPTConfig, ImageGPTModel
from transformers.activations import NewGELUActivation

from dtlib.dropout import add_dropped
from dtlib.tasks import Task

ARCHITECTURES = {"gpt2": (GPT2Config, GPT2Model), "imagegpt": (ImageGPTConfig, ImageGPTModel)}
# Slices of the tokens R̂_1, s_1, a_1, R̂_2, …: state tokens, the last one, all of them.
STATE_TOKENS, LAST, ALL = slice(1, None, 3), slice(-1, None), slice(None)


class DecisionTransformer(nn.Module):
    """Predict action a_t from the tokens R̂_1, s_1, a_1, …, R̂_t, s_t (Chen et al. 2021).

    Each kind of token has its own linear embedding. The time-step embedding is added after the
    input LayerNorm, as in papers A and B [code]; Chen et al. add it before. There is no word or
    position table. ``backbone`` is the configuration of the blocks.

    ``action_head``: "tied" predicts tanh(W_aᵀh) with the weight W_a of the action embedding, as in
    papers A and B; "separate" has a linear layer of its own, as in Chen et al.
    """

    def __init__(
        self, task: Task, backbone: GPT2Config | ImageGPTConfig, action_head: str = "tied"
    ):
        super().__init__()
        self.config = backbone
        self.add_embeddings(task, backbone.hidden_size, action_head)
        transformer = ARCHITECTURES[backbone.model_type][1](backbone)
        self.h, self.ln_f = transformer.h, transformer.ln_f
        for block in self.h:
            if isinstance(block.mlp.act, NewGELUActivation):
                block.mlp.act = nn.GELU(approximate="tanh")  # the same function, fused

    def add_embeddings(self, task: Task, width: int, action_head: str) -> None:
        """Construct all modules but the blocks and the final norm."""
        self.embed_return = nn.Linear(1, width)
        self.embed_state = nn.Linear(task.state_dim, width)
        self.embed_action = nn.Linear(task.action_dim, width)
        self.embed_time = nn.Embedding(task.horizon, width)
        self.embed_ln = nn.LayerNorm(width)
        self.head = None
        if action_head == "separate":
            with torch.random.fork_rng(devices=[]):  # other weights stay; see starts.build_model
                self.head = nn.Linear(width, task.action_dim)

    def forward(
        self, states: Tensor, actions: Tensor, returns_to_go: Tensor, time_steps: Tensor
    ) -> Tensor:
        """Return predicted actions (B, K, A) in [−1, 1]. Prediction t does not see action a_t.

        states (B, K, S) standardised; actions (B, K, A); returns_to_go (B, K) divided by the task's
        scale; time_steps (B, K) int64, below the horizon. Windows are padded on the right.
        """
        tokens = self.embed(states, actions, returns_to_go, time_steps)
        hidden = self.hidden(tokens[:, :-1], STATE_TOKENS)  # no prediction sees the last action
        return self.predict_action(hidden)

    def act(self, *window: Tensor) -> Tensor:
        """Like ``forward(*window)[:, -1]`` (B, A) for windows without padding, but faster.

        The last block computes the last token alone.
        """
        return self.predict_action(self.hidden(self.embed(*window)[:, :-1], LAST)[:, 0])

    def predict_action(self, hidden: Tensor) -> Tensor:
        """Return actions (..., A) from the state tokens' final hidden states (..., D)."""
        scores = hidden @ self.embed_action.weight if self.head is None else self.head(hidden)
        return torch.tanh(scores)

    def embed_kinds(self, states: Tensor, actions: Tensor, returns_to_go: Tensor) -> Tensor:
        """Return R̂, s and a after the input norm, before time is added: (B, K, 3, D)."""
        kinds = (
            self.embed_return(returns_to_go.unsqueeze(-1)),  # (B, K) → (B, K, 1) → (B, K, D)
            self.embed_state(states),
            self.embed_action(actions),
        )
        return self.embed_ln(torch.stack(kinds, dim=2))

    def embed(
        self, states: Tensor, actions: Tensor, returns_to_go: Tensor, time_steps: Tensor
    ) -> Tensor:
        """Return the tokens (B, T, D), T = 3K, in the order R̂_1, s_1, a_1, R̂_2, …"""
        kinds = self.embed_kinds(states, actions, returns_to_go)  # (B, K, 3, D)
        time = self.embed_time(time_steps).unsqueeze(2)  # (B, K, 1, D)
        return (kinds + time).flatten(1, 2)  # (B, 3K, D)

    def hidden(self, tokens: Tensor, wanted: slice = ALL) -> Tensor:
        """Apply the blocks and the final norm: (B, T, D) → (B, W, D), W being the wanted tokens.

        Attention is causal, so padding on the right needs no mask. The layers are transformers'.
        They are put together here to make dropout cheap and to skip unwanted tokens in the last
        block, after its attention (in ``act``, in its attention, too).
        """
        at_input = self.config.embd_pdrop if self.training else 0.0
        inside = self.config.resid_pdrop if self.training else 0.0
        hidden = add_dropped(None, tokens, at_input)
        for block in self.h:
            only = wanted if block is self.h[-1] else ALL
            attended = self._attention(block, hidden, only)  # (B, W, D)
            hidden = add_dropped(hidden[:, only], attended, inside)
            inner = block.mlp.act(block.mlp.c_fc(block.ln_2(hidden)))  # (B, W, 4D)
            hidden = add_dropped(hidden, block.mlp.c_proj(inner), inside)
        return self.ln_f(hidden)

    def _attention(self, block: nn.Module, hidden: Tensor, only: slice) -> Tensor:
        """Return a block's attention branch for the W tokens ``only``: (B, T, D) → (B, W, D)."""
        split = block.attn.c_attn(block.ln_1(hidden)).unflatten(-1, (3, block.attn.num_heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        drop = self.config.attn_pdrop if self.training else 0.0
        if drop and not hidden.is_cuda:  # torch has no fused kernel with dropout on a CPU
            scores = query[:, :, only] @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            future = torch.full((key.shape[2],) * 2, -torch.inf, dtype=scores.dtype).triu(1)[only]
            mixed = add_dropped(None, (scores + future).softmax(-1), drop) @ value
        elif only == LAST:  # the last token sees all
            mixed = scaled_dot_product_attention(query[:, :, only], key, value, dropout_p=drop)
        else:
            mixed = scaled_dot_product_attention(query, key, value, dropout_p=drop, is_causal=True)
            mixed = mixed[:, :, only]
        merged = mixed.transpose(1, 2).flatten(2)  # (B, H, W, D/H) → (B, W, D)
        return block.attn.c_proj(merged.contiguous())
