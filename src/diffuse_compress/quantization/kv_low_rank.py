"""Keys of low rank, and the chunks of a sequence that a query asks for.

Source: Sun et al. 2024, arXiv 2410.21465 (ShadowKV). Before rotary embedding the keys of a sequence, those of all heads
side by side, are nearly of low rank; rotation takes that away. A chunk of a few tokens is well described by the mean of
its rotated keys, its landmark, but for a few chunks whose keys point elsewhere: these are kept as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["LowRankKeys", "chunk_scores", "landmarks", "least_similarity"]


@dataclass
class LowRankKeys:
    """Keys [B, H, T, D] of rank r, those of all heads as one matrix [T, H * D]: ``left @ right``.

    Attributes:
        left: [B, T, r] with orthonormal columns, rounded to the keys' dtype.
        right: [B, r, H * D].
        heads: H.
    """

    left: torch.Tensor
    right: torch.Tensor
    heads: int

    @classmethod
    def of(cls, keys: torch.Tensor, rank: int) -> LowRankKeys:
        """The best approximation of ``keys`` [B, H, T, D]; computed in fp32."""
        empty = LowRankKeys(
            keys.new_zeros(keys.shape[0], 0, 0),
            keys.new_zeros(keys.shape[0], 0, keys.shape[1] * keys.shape[3]),
            keys.shape[1],
        )
        return empty.append(keys, rank)

    def append(self, keys: torch.Tensor, rank: int) -> LowRankKeys:
        """With ``keys`` [B, H, t, D] after these: the best approximation of rank ``rank`` of both together.

        The columns of ``left`` are orthonormal, so the singular vectors of both are those of ``right`` and the new
        keys, one on top of the other: nothing as long as the sequence is decomposed.
        """
        batch, _, tokens, _ = keys.shape
        new = keys.transpose(1, 2).reshape(batch, tokens, -1).float()
        old = self.right.shape[1]
        u, s, v = torch.linalg.svd(torch.cat([self.right.float(), new], dim=1), full_matrices=False)
        kept = min(rank, s.shape[-1])
        u, right = u[..., :kept], s[..., :kept, None] * v[..., :kept, :]
        left = torch.cat([self.left.float() @ u[:, :old], u[:, old:]], dim=1)
        return LowRankKeys(left.to(keys.dtype), right.to(keys.dtype), self.heads)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.left.shape[1]

    @property
    def nbytes(self) -> int:
        """Of both factors."""
        return self.left.nbytes + self.right.nbytes

    def rows(self, places: torch.Tensor) -> torch.Tensor:
        """Keys [B, H, n, D] of the tokens ``places`` [B, H, n], head by head."""
        left = self.left.unsqueeze(1).expand(-1, places.shape[1], -1, -1)
        left = left.gather(2, places.unsqueeze(-1).expand(-1, -1, -1, left.shape[-1]))
        found: torch.Tensor = left @ self.right.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return found

    def all(self) -> torch.Tensor:
        """Keys [B, H, T, D] of all tokens."""
        found: torch.Tensor = (self.left @ self.right).unflatten(-1, (self.heads, -1))
        return found.transpose(1, 2)


def landmarks(keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean [B, H, C, D] of the ``valid`` [B, C, s] keys [B, H, C, s, D] of each chunk; 0 where there is none."""
    weight = valid[:, None, :, :, None].to(keys.dtype)
    return (keys * weight).sum(dim=3) / weight.sum(dim=3).clamp_min(1)


def least_similarity(keys: torch.Tensor, means: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """fp32 [B, H, C]: of each chunk the smallest cosine of a valid key and the landmark; 2 where there is none.

    Arguments as those and the result of :func:`landmarks`.
    """
    cosine = torch.nn.functional.cosine_similarity(keys.float(), means.unsqueeze(3).float(), dim=-1)
    return cosine.masked_fill(~valid[:, None], 2.0).amin(dim=-1)


def chunk_scores(query: torch.Tensor, means: torch.Tensor, scaling: float) -> torch.Tensor:
    """fp32 [B, H, C]: the share of attention that each chunk would get, the largest of the G heads that read it.

    Args:
        query: of one token; G heads of it read each head of the keys.
        means: landmarks [B, H, C, D].
        scaling: of the logits.
    """
    batch, heads, _, size = means.shape
    logits = query.reshape(batch, heads, -1, size).float() @ means.float().transpose(-1, -2) * scaling
    return logits.softmax(dim=-1).amax(dim=2)
