"""Layers, composed from the ops; one idea a file."""

from minitransformer.autograd import Parameter
from minitransformer.nn.attention import MultiHeadAttention, SelfAttention
from minitransformer.nn.clip import clip_grad_norm_
from minitransformer.nn.decoder_layer import DecoderLayer
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.embedding import Embedding, SinusoidalPositions
from minitransformer.nn.encoder_layer import EncoderLayer
from minitransformer.nn.feed_forward import FeedForward
from minitransformer.nn.kv_cache import DecoderCache, KVCache, MemoryCache
from minitransformer.nn.linear import Linear
from minitransformer.nn.linear_attention import LinearSelfAttention, StateCache
from minitransformer.nn.module import Module
from minitransformer.nn.norm import LayerNorm, RMSNorm
from minitransformer.nn.patch_embedding import PatchEmbedding

__all__ = [
    "DecoderCache",
    "DecoderLayer",
    "Dropout",
    "Embedding",
    "EncoderLayer",
    "FeedForward",
    "KVCache",
    "LayerNorm",
    "Linear",
    "LinearSelfAttention",
    "MemoryCache",
    "Module",
    "MultiHeadAttention",
    "Parameter",
    "PatchEmbedding",
    "RMSNorm",
    "SelfAttention",
    "SinusoidalPositions",
    "StateCache",
    "clip_grad_norm_",
]
