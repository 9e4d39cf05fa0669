"""What a run reads, on its mesh: training batches from any step on, and evaluation batches of any source."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from mim_jax.data import images, mixtures
from mim_jax.data.pipeline import Pipeline, to_device
from mim_jax.data.sources import Source
from mim_jax.parallel import mesh as meshes


@dataclasses.dataclass
class Feeds:
  """Opens each source once and puts batches on the mesh.

  Attributes:
    cfg: config.data.
    mesh: of the run.
    seed: of data order and augmentation.
  """

  cfg: object
  mesh: Mesh
  seed: int
  _opened: dict[str, Source] = dataclasses.field(default_factory=dict)

  def source(self, spec: str) -> Source:
    """The source (or mixture) that `spec` names; a synthetic world is rendered first if it is not on disk.

    Raises MissingData with the command that prepares it.
    """
    if spec not in self._opened:
      mixtures.prepare(spec, self.cfg.data_dir)
      weights = self.cfg.weights if spec == self.cfg.source else ()
      self._opened[spec] = mixtures.open_sources(spec, weights, self.cfg.data_dir, self.cfg.cache)
    return self._opened[spec]

  def training(self, batch_size: int, fields: Sequence[str]) -> Pipeline:
    """Pipeline of the run's own source with this process's rows of the global batch."""
    return self.pipeline(self.cfg.source, self.cfg.transforms, batch_size, fields, self.seed)

  def pipeline(self, source: str, transforms: str, batch_size: int, fields: Sequence[str], seed: int) -> Pipeline:
    opened = self.source(source)
    return Pipeline(
      opened,
      images.parse(transforms).bind(opened),
      batch_size,
      seed,
      rows=meshes.local_rows(self.mesh, batch_size),
      threads=self.cfg.threads,
      prefetch=self.cfg.prefetch,
      fields=fields,
    )

  def batches(self, pipeline: Pipeline, start: int):
    """Iterator of (step, global batch on the mesh) from step `start` on; has `close()`."""
    return to_device(pipeline.iterate(start), meshes.batch_sharding(self.mesh))

  def evaluation(
    self, source: str, transforms: str, batch_size: int, fields: Sequence[str], shuffle: int | None = None
  ) -> Iterator[dict]:
    """Global batches for an evaluator: each example once with 'weight' (shuffle None), or endless shuffled ones (shuffle: their seed)."""
    made = self.pipeline(source, transforms, batch_size, fields, shuffle or 0)
    rows = made.once() if shuffle is None else made.iterate()
    with contextlib.closing(to_device(rows, meshes.batch_sharding(self.mesh))) as batches:
      for _, batch in batches:
        yield batch

  def first(self, source: str, transforms: str, count: int, fields: Sequence[str]) -> dict[str, jax.Array]:
    """The first `count` examples, whole on every device (for pictures)."""
    opened = self.source(source)
    chain = images.parse(transforms).bind(opened)
    made = Pipeline(opened, chain, count, self.seed, shuffle=False, threads=0, fields=fields)
    batch = made.batch(0)
    batch.pop('corrupt')
    whole = meshes.replicated(self.mesh)
    return {name: jax.make_array_from_process_local_data(whole, value, value.shape) for name, value in batch.items()}
