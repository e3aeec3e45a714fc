"""Training objectives of inpainting methods as their released code computes them, in plain PyTorch.

One file holds one family: `edge_connect` that method and those that took over its loss file (CTN, T-former,
TransCNN-HAE, AOT-GAN), `transformers` MAT, CoordFill and CMT, `lama_fourier` LaMa, `pixels` partial convolution and
DeepFill, `common` what they share. All their names are in ``published``.

Nothing here is fused, shared or made safe: each function repeats, term by term, what a training script of its method
does today. Use it to check an implementation, or to measure against. The tests compare it with the objectives of the
package, and these with figures that the released code computed, but for cmt and deepfill, of which there are none.

Arguments have the same meaning everywhere. ``pred`` is the network's output before anything is pasted over it and
``target`` the truth, both (N, 3, H, W) in the range the method trains in. ``mask`` is (N, 1, H, W); what its 1 means
depends on the method, too:

=============== ============== ========== ===================================== ==============================
method          mask 1 means   images     trunk                                 the discriminator sees
=============== ============== ========== ===================================== ==============================
partial_conv    known          [0, 1]     VGG16                                 no discriminator
ctn, t_former   known          [-1, 1]    VGG19                                 the output
mat             known          [-1, 1]    VGG19                                 [mask - 0.5, composite], twice
transcnn_hae    no mask        [-1, 1]    VGG19                                 no discriminator
coordfill       known          [-1, 1]    AlexNet                               the composite
cmt             hole           [0, 1]     VGG16                                 the composite
lama            hole           [0, 1]     ResNet50 trained for segmentation     the output
edge_connect    hole           [0, 1]     VGG19                                 the output, or [gray, edges]
aot_gan         hole           [-1, 1]    VGG19                                 the composite
deepfill_v1     hole           [-1, 1]    none                                  the composite, and a patch of it
deepfill_v2     hole           [-1, 1]    none                                  [composite, mask]
=============== ============== ========== ===================================== ==============================

``trunk(images, layers)`` returns the frozen network's feature maps of the named layers ("relu1_1", "pool1", "conv4_4"
before its ReLU; "relu1" for AlexNet) and does nothing else to the images: where a method normalises them, its
function does. ``fake`` and ``real`` are what the discriminator returns for generated and for true images, logits
before any sigmoid.

Generator objectives return a dictionary of the raw terms and ``"total"``, their weighted sum; discriminator
objectives return ``"real"``, ``"fake"`` and ``"total"``. Penalties on the discriminator's gradient are functions of
their own.
"""

from __future__ import annotations

from .common import *  # noqa: F403
from .edge_connect import *  # noqa: F403
from .lama_fourier import *  # noqa: F403
from .pixels import *  # noqa: F403
from .transformers import *  # noqa: F403
