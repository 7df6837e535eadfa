"""Feature reuse (paper A, 5.1): debiased linear CKA between a layer's outputs in two models, on the same n windows."""

from torch import Tensor

# Paper A's nine layers a block. Without dropout two of them only repeat the one before: what they equal.
NINE = ("ln_1", "attn.c_attn", "attn.c_proj", "attn.resid_dropout", "ln_2", "mlp.c_fc", "mlp.c_proj", "mlp.act", "mlp.dropout")
EQUAL = {"attn.resid_dropout": "attn.c_proj", "mlp.dropout": "mlp.c_proj"}


def nine_layers(blocks: int, shared_activation: bool) -> dict[str, str]:
    """Each of paper A's 9·L layer names, in its order, and the name of the output (as in dtlib.probe) that it stands for.

    ``shared_activation`` [code]: all blocks call one activation object, so every "mlp.act" holds the last block's output.
    """
    return {f"h.{i}.{layer}": f"h.{blocks - 1 if shared_activation and layer == 'mlp.act' else i}.{EQUAL.get(layer, layer)}"
            for i in range(blocks) for layer in NINE}


def unit_features(activation: Tensor) -> Tensor:
    """As released: ``act[:, :, -2]`` and its neighbours; of activations (B, T, D') one hidden unit of all T tokens, (3, B, T).

    The units -3, -2 and -1 stand where the paper says return, state and action.
    """
    return activation[:, :, -3:].movedim(-1, 0)


def token_features(activation: Tensor) -> Tensor:
    """As written: the last step's return, state and action token, of activations (B, T, D') all D' units, (3, B, D')."""
    return activation[:, -3:].movedim(1, 0)


def gram(features: Tensor) -> Tensor:
    """Inner products of all pairs of n windows, centred without bias: (..., n, n) float64 of features (..., n, p).

    [code; Székely and Rizzo 2014] The diagonal is 0, each row sums to 0, and the product of two such of independent features
    is 0 on average. All zeros where only rounding is left. Raises ValueError for less than 4 windows.
    """
    n = features.shape[-2]
    if n < 4:
        raise ValueError(f"Debiased CKA needs at least 4 windows, not {n}.")
    features = features.double()
    products = features @ features.mT
    products.diagonal(dim1=-2, dim2=-1).zero_()
    size = products.norm(dim=(-2, -1), keepdim=True)
    means = products.sum(-1) / (n - 2)
    means -= means.sum(-1, keepdim=True) / (2 * (n - 1))
    products -= means[..., :, None]
    products -= means[..., None, :]
    products.diagonal(dim1=-2, dim2=-1).zero_()
    products *= products.norm(dim=(-2, -1), keepdim=True) > 1e-12 * size
    return products


def cka(first: Tensor, second: Tensor, added: float = 0.0) -> Tensor:
    """Debiased CKA (...) of ``gram``s (..., n, n): 1 if equal up to rotation and scale, 0 on average if independent.

    NaN where an output is the same for all windows. ``added`` to the denominator: 1e-6 as released, which then gives 0.
    """
    return (first * second).sum((-2, -1)) / (first.norm(dim=(-2, -1)) * second.norm(dim=(-2, -1)) + added)


def cka_between(first: Tensor, second: Tensor) -> Tensor:
    """Debiased CKA (l, m) of every one of l ``gram``s (l, n, n) with every one of m (m, n, n)."""
    a, b = first.flatten(-2), second.flatten(-2)
    return (a / a.norm(dim=-1, keepdim=True)) @ (b / b.norm(dim=-1, keepdim=True)).mT


def leave_one_out(first: Tensor, second: Tensor) -> Tensor:
    """Debiased CKA (..., n) of ``gram``s (..., n, n) without each of n ≥ 5 windows in turn, without computing it n times.

    It is the U-statistic of Song et al. (2012, eq. 5) on the n - 1 windows left, where what the rows sum to drops out.
    """
    n = first.shape[-1]

    def hsic(a: Tensor, b: Tensor) -> Tensor:  # times a constant
        rows = (a * b).sum(-1)
        return rows.sum(-1, keepdim=True) - 2 * (n - 2) / (n - 3) * rows
    return hsic(first, second) / (hsic(first, first) * hsic(second, second)).sqrt()


def jackknife_error(without_each: Tensor) -> Tensor:
    """Standard error (...) over windows of a statistic, from its values (..., n) without each window in turn."""
    return (without_each.shape[-1] - 1) ** 0.5 * without_each.std(-1, correction=0)
