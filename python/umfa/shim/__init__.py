"""umfa under other libraries' names, for programs that import these libraries.

>>> import umfa.shim
>>> shim = umfa.shim.flash_attn()  # `import flash_attn` finds umfa now
>>> shim.remove()

Importing this module changes nothing. Each function adds modules to ``sys.modules``, and refuses if
the library itself can be imported: umfa never takes its place.
"""

from __future__ import annotations

from ._modules import Shim

__all__ = ["Shim", "flash_attn", "metal_sdpa_extension", "xformers"]


def __dir__() -> list[str]:
    return __all__


def metal_sdpa_extension(*, children: bool = True) -> Shim:
    """Make ``metal_sdpa_extension`` and ``pytorch_custom_op_ffi`` importable, for SimpleTuner.

    umfa computes PyTorch's ``scaled_dot_product_attention`` from then on, as `umfa.torch.enable`
    describes: these modules do that when they are imported.

    Parameters
    ----------
    children : bool
        Let Python processes that this one starts import the modules, too: a folder with them is
        put in front of ``PYTHONPATH``. SimpleTuner checks the modules in such a process.

    Returns
    -------
    Shim
        `Shim.remove` undoes everything; so does the end of a ``with`` block.

    Raises
    ------
    umfa.UnsupportedError
        One of the modules can be imported already.
    """
    from . import _metal_sdpa

    return _metal_sdpa.install(children)


def flash_attn() -> Shim:
    """Make flash-attn 2's modules importable, by umfa's functions.

    ``flash_attn`` and ``flash_attn.flash_attn_interface`` have the public functions, and the second
    the private ones that ring-flash-attn calls. They return what flash-attn 2 returns: +inf as the
    log-sum-exp of a query that sees no key, and an empty tensor where there are no weights. There
    are also ``flash_attn.bert_padding``, and ``apply_rotary_emb`` of ``flash_attn.layers.rotary``,
    in torch.

    Libraries that ask for an installed distribution of flash-attn, as transformers and diffusers
    do, do not find one; see `umfa.transformers` and `umfa.diffusers`.

    Returns
    -------
    Shim
        `Shim.remove` undoes everything; so does the end of a ``with`` block.

    Raises
    ------
    umfa.UnsupportedError
        flash-attn can be imported already.
    """
    from . import _flash_attn

    return _flash_attn.install()


def xformers() -> Shim:
    """Make xformers' memory-efficient attention importable, by umfa.

    ``xformers.ops`` and ``xformers.ops.fmha`` have ``memory_efficient_attention``, its forward
    pass, and ``xformers.ops.fmha.attn_bias`` all masks, which umfa reads as they are described.
    The rest of xformers is not there.

    Returns
    -------
    Shim
        `Shim.remove` undoes everything; so does the end of a ``with`` block.

    Raises
    ------
    umfa.UnsupportedError
        xformers can be imported already.
    """
    from . import _xformers

    return _xformers.install()
