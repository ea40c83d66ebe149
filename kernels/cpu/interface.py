"""The structs of interface.h for ctypes; the library compares their sizes when it is loaded."""

import ctypes

VERSION = 3
"""What sf_interface says."""

_int, _real, _pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class Sweep(ctypes.Structure):
    """SfSweep."""

    _fields_ = [
        ("num_points", _int),
        ("num_signals", _int),
        ("channels", _int),
        ("num_layers", _int),
        ("num_shared", _int),
        ("widths", _pointer),
        ("weights", _pointer),
        ("biases", _pointer),
        ("omegas", _pointer),
        ("points", _pointer),
        ("values", _pointer),
        ("value_strides", _int * 3),
        ("point_weights", _pointer),
        ("point_weight_strides", _int * 2),
        ("scale", _pointer),
        ("dweights", _pointer),
        ("dbiases", _pointer),
        ("dpoints", _pointer),
        ("losses", _pointer),
        ("predictions", _pointer),
        ("tile", _int),
        ("threads", _int),
        ("kernels", ctypes.c_char_p),
    ]


class Fit(ctypes.Structure):
    """SfFit."""

    _fields_ = [
        ("num_points", _int),
        ("channels", _int),
        ("num_layers", _int),
        ("widths", _pointer),
        ("omegas", _pointer),
        ("points", _pointer),
        ("values", _pointer),
        ("parameters", _pointer),
        ("exp_avg", _pointer),
        ("exp_avg_sq", _pointer),
        ("frozen", _int),
        ("num_rows", _int),
        ("rows", _pointer),
        ("until", _int),
        ("budget", _int),
        ("learning_rates", _pointer),
        ("beta1", _real),
        ("beta2", _real),
        ("eps", _real),
        ("target_mse", _pointer),
        ("check_every", _int),
        ("guard", _real),
        ("step", _pointer),
        ("adam_step", _pointer),
        ("scale", _pointer),
        ("best_mse", _pointer),
        ("best", _pointer),
        ("rollbacks", _pointer),
        ("mse", _pointer),
        ("measured", _pointer),
        ("reason", _pointer),
        ("seconds", _pointer),
        ("threads", _int),
        ("kernels", ctypes.c_char_p),
    ]
