"""Robust MAE: frequency-domain prompts for a fine-tuned MAE's input (Huang et al. 2023, arXiv 2308.10315).

No code was ever published (shikiw/RobustMAE holds a README). From the abstract: a MAE leans on medium and high
frequencies, which makes it easy to attack; training images are clustered, each cluster gets a visual prompt in the
frequency domain that holds medium and high frequencies, and a test image is given the prompt of the nearest prototype,
with the network as it is. Everything else is this project's specification: transform and band, features and number of
clusters, objective and inner attack.

A run has three phases, told apart by the step and the carried state. (0) For `classifier_steps` steps the classifier
itself is trained, for runs that do not start from a fine-tuned one (`init_from`). (1) Features of training images fill
a bank, which k-means turns into prototypes. (2) The prompts are trained against an attack on the defended network. The
recipe freezes the classifier by `optim.lr_mult`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax.errors import ConfigError, nearest
from mim_jax.method import Field, Method
from mim_jax.models import heads, vit
from mim_jax.ops import attacks, clustering, frequency, losses, patches, pixels

DEFAULTS = {
  'size': 'B',  # classifier: Ti S B L H or 'width/depth/heads'
  'patch': 16,  # side, or (height, width)
  'image_size': 224,  # side, or (height, width)
  'channels': 3,
  'classes': 1000,
  'mlp_ratio': 4.0,
  'ln_eps': 1e-6,
  'pool': 'mean',  # mean (of the patch tokens, then fc_norm) | cls
  'pos': 'learned',  # fine-tuning trains the position table; sincos for a classifier trained on MAE's fixed one
  'head_std': 2e-5,  # of the head's initial kernel
  'transform': 'fft',  # fft (centred Fourier transform) | dct
  'radius': 0.0,  # cycles per image up to which the prompt leaves the image alone; 0: an eighth of its height
  'cutoff': 0.0,  # the same for dct, in u + v; 0: twice the radius
  'clusters': 10,
  'bank': 16384,  # training images whose features are clustered
  'lloyd_steps': 20,
  'classifier_steps': 0,
  'eps': 2 / 255,  # of the inner attack, in pixels of [0, 1]
  'attack_steps': 3,
  'attack_rate': 0.5,  # step of the inner attack, in eps
  'clean': 1.0,  # weight of the loss on clean images
}

STATS = 'imagenet'  # normalisation inside the classifier


def apply_prompt(image, prompt, mask, transform: str, clip: bool = True):
  """image [B, H, W, C] in [0, 1] with `prompt` added to its spectrum where mask [H, W] is 1, clipped to [0, 1].

  prompt: fft [B, 2, H, W, C] (real and imaginary part), dct [B, H, W, C].
  """
  if transform == 'fft':
    image = frequency.ifft2(frequency.fft2(image) + mask[..., None] * jax.lax.complex(prompt[:, 0], prompt[:, 1]))
  else:
    image = frequency.idct2(frequency.dct2(image) + mask[..., None] * prompt)
  return attacks.clip(image) if clip else image


@dataclasses.dataclass(frozen=True)
class Defence:
  """The classifier f and the prompt before it; images [B, H, W, C] lie in [0, 1].

  `params` is {'encoder', 'fc_norm', 'head', 'prompt'}.

  Attributes:
    mask: [H, W], the coefficients of `transform` that a prompt may touch.
  """

  classifier: heads.Classifier
  mask: np.ndarray
  transform: str

  def classify(self, params, image):
    """(logits [B, classes], features [B, D]) of f, whose first operation is the normalisation."""
    parts = {name: part for name, part in params.items() if name != 'prompt'}
    return self.classifier.apply({'params': parts}, pixels.renormalize(image, 'none', STATS))

  def select(self, params, prototypes, image):
    """Index [B] of the prototype [K, D] nearest to the features of the image as it is; no gradient flows through it."""
    return clustering.nearest(jax.lax.stop_gradient(self.classify(params, image)[1]), prototypes)

  def prompted(self, params, image, cluster):
    """The image with the prompt of its cluster [B]."""
    return apply_prompt(image, params['prompt'][cluster], self.mask, self.transform)

  def logits(self, params, prototypes, image):
    """What the defended network F says: the prompt follows from the image as received, be it attacked."""
    return self.classify(params, self.prompted(params, image, self.select(params, prototypes, image)))[0]


def defence(cfg) -> Defence:
  """The network for the options in `cfg`."""
  height, width = vit.sides(cfg.image_size, 2)
  patch, radius = vit.sides(cfg.patch, 2), cfg.radius or height / 8
  encoder = vit.ViT(
    **vit.size(cfg.size),
    patch=patch,
    grid=patches.grid_of((height, width), patch),
    mlp_ratio=cfg.mlp_ratio,
    pos=cfg.pos,
    final_norm=cfg.pool == 'cls',
    eps=cfg.ln_eps,
    dtype=cfg.dtype,
    scan=cfg.scan,
    remat=cfg.remat,
  )
  if cfg.transform == 'fft':
    mask = frequency.fft_band(height, width, radius)
  else:
    mask = frequency.dct_band(height, width, cfg.cutoff or 2 * radius)
  return Defence(heads.Classifier(encoder, cfg.classes, cfg.pool, cfg.head_std), mask, cfg.transform)


def make(cfg) -> Method:
  for option, known in {'transform': ('fft', 'dct'), 'pool': ('mean', 'cls'), 'pos': ('learned', 'sincos')}.items():
    if cfg[option] not in known:
      raise ConfigError(f'method.{option} is {cfg[option]!r}; {nearest(cfg[option], known)}')
  if not 0 < cfg.clusters <= cfg.bank:
    raise ConfigError(f'method.clusters={cfg.clusters}, bank={cfg.bank}: k-means needs an example or more per cluster')
  net = defence(cfg)
  sides, channels = vit.sides(cfg.image_size, 2), cfg.channels
  shape = (cfg.clusters, *((2,) if cfg.transform == 'fft' else ()), *sides, channels)
  clusters, bank, lloyd_steps, classifier_steps = cfg.clusters, cfg.bank, cfg.lloyd_steps, cfg.classifier_steps
  eps, attack_steps, alpha, clean_weight = cfg.eps, cfg.attack_steps, cfg.attack_rate * cfg.eps, cfg.clean
  fields = {
    'image': Field('B H W C', (*sides, channels), doc="RGB in [0, 1] (data.transforms ends in normalize('none'))"),
    'label': Field('B', (), 'int32', doc='class'),
  }

  def init(key, batch):
    del batch
    params = net.classifier.init(key, jnp.zeros((1, *sides, channels)))['params']
    return {**params, 'prompt': jnp.zeros(shape)}  # so the defence starts as the identity

  def state(params):
    width = params['head']['kernel'].shape[0]
    return {
      'bank': jnp.zeros((bank, width)),
      'filled': jnp.int32(0),
      'prototypes': jnp.zeros((clusters, width)),
    }

  def draw(key, batch):
    return {'start': jax.random.uniform(key, batch['image'].shape, minval=-1.0)}

  def loss(params, state, frozen, batch, draws, step):
    del frozen
    image, label = batch['image'], batch['label']
    fixed = {**jax.lax.stop_gradient(params), 'prompt': params['prompt']}
    zero = jnp.float32(0)  # of what there is in the last phase only
    nothing = {'adversarial': jnp.zeros_like(image), 'loss/adversarial': zero, 'accuracy/adversarial': zero}

    def judge(params, image):
      logits, features = net.classify(params, image)
      return losses.cross_entropy(logits, label), jnp.mean(jnp.argmax(logits, 1) == label), features

    def train_classifier(_):
      value, accuracy, features = judge(params, image)
      return value, {**nothing, 'loss/clean': value, 'accuracy/clean': accuracy, 'features': features}

    def gather(_):
      value, accuracy, features = judge(jax.lax.stop_gradient(params), image)
      return value, {**nothing, 'loss/clean': value, 'accuracy/clean': accuracy, 'features': features}

    def train_prompts(_):
      cluster = net.select(fixed, state['prototypes'], image)
      # Draws may hold the attacked images: reference numbers do, as rounding may turn the sign of a gradient.
      adversarial = draws.get('adversarial')
      if adversarial is None:
        still = jax.lax.stop_gradient(params)
        attacked = lambda x: net.classify(still, net.prompted(still, x, cluster))[0]
        adversarial = attacks.pgd(attacked, image, label, eps * draws['start'], eps, alpha, attack_steps)
      adversarial = jax.lax.stop_gradient(adversarial)
      hard, hard_accuracy, _ = judge(fixed, net.prompted(fixed, adversarial, cluster))
      easy, easy_accuracy, features = judge(fixed, net.prompted(fixed, image, cluster))
      return hard + clean_weight * easy, {
        'adversarial': adversarial,
        'loss/adversarial': hard,
        'accuracy/adversarial': hard_accuracy,
        'loss/clean': easy,
        'accuracy/clean': easy_accuracy,
        'features': features,
      }

    phase = jnp.where(step < classifier_steps, 0, jnp.where(state['filled'] < bank, 1, 2))
    value, seen = jax.lax.switch(phase, (train_classifier, gather, train_prompts), None)
    metrics = {name: seen[name] for name in seen if '/' in name}
    out = {'features': jax.lax.stop_gradient(seen['features']), 'adversarial': seen['adversarial']}
    return value, {'metrics': {**metrics, 'phase': phase.astype(jnp.float32)}, 'out': out}

  def after_step(state, params, out, step):
    """Fills the bank once the classifier is trained, and clusters it when it is full; then nothing changes any more."""
    del params
    rows = out['features'][:bank].astype(jnp.float32)

    def add(state):
      filled = jnp.minimum(state['filled'] + len(rows), bank)
      whole = jax.lax.dynamic_update_slice(state['bank'], rows, (state['filled'], 0))
      cluster = lambda: clustering.lloyd(whole, whole[:clusters], lloyd_steps)[0]
      prototypes = jax.lax.cond(filled == bank, cluster, lambda: state['prototypes'])
      return {'bank': whole, 'filled': filled, 'prototypes': prototypes}

    return jax.lax.cond((step >= classifier_steps) & (state['filled'] < bank), add, lambda state: state, state)

  def encode(params, batch, state=None, layers=False, drop=None):
    """The defended network: also 'logits' [B, classes], and 'undefended' [B, classes], what f itself says."""
    if not state:
      raise ValueError('the prompts are chosen by prototypes of clusters: encode needs the state beside the params')
    image, cluster = batch['image'], net.select(params, state['prototypes'], batch['image'])
    seen = net.prompted(params, image, cluster)
    normed = pixels.renormalize(seen, 'none', STATS)
    out = vit.encode(net.classifier.encoder, params['encoder'], normed, layers, drop)
    return out | {'logits': net.classify(params, seen)[0], 'undefended': net.classify(params, image)[0]}

  def panels(params, state, frozen, batch, draws):
    del frozen
    image, label = batch['image'], batch['label']
    prototypes = state['prototypes']
    cluster = net.select(params, prototypes, image)
    prompt = apply_prompt(jnp.zeros_like(image), params['prompt'][cluster], net.mask, net.transform, clip=False)
    attack = lambda logits_of: attacks.pgd(logits_of, image, label, eps * draws['start'], eps, eps / 4, 10)
    plain = attack(lambda x: net.classify(params, x)[0])
    adaptive = attack(lambda x: net.logits(params, prototypes, x))
    spectrum = lambda x: jnp.log1p(100 * jnp.abs(frequency.fft2(x)))
    brightest = lambda x: x / jnp.maximum(jnp.max(x, axis=(1, 2, 3), keepdims=True), 1e-9)
    grey = lambda x: jnp.repeat(jnp.mean(x, -1, keepdims=True), channels, -1)
    return {
      'input': image,
      'prompted': net.prompted(params, image, cluster),
      'prompt (x4)': jnp.clip(0.5 + 4 * prompt, 0, 1),
      'its spectrum (log)': brightest(grey(spectrum(prompt))),
      'attack on f (full range)': 0.5 + (plain - image) / (2 * eps),
      'its spectrum': brightest(grey(spectrum(plain - image))),
      'attack on the defence': 0.5 + (adaptive - image) / (2 * eps),
    }

  return Method(fields, init, draw, loss, encode, state=state, after_step=after_step, panels=panels)
