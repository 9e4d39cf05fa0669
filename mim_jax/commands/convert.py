"""mim-jax convert: weights of other libraries in, ours out."""

from pathlib import Path

HELP = """turns weights of other libraries into our files, and runs or our files into theirs

What a file is follows from its names; config.json beside it is read. Neither torch nor the other library is needed, and nothing that is
pickled in a .pth is run. At the end the features of two fixed images are shown, and compared with those of the other library where
it is installed. Exit code 1 if they differ.

  mim-jax convert mae_pretrain_vit_base.pth --out=mae_b.safetensors
  mim-jax convert clip-vit-base-patch16/ --out=clip_b16.safetensors
  mim-jax convert dinov2-base/ --image_size=224 --out=dinov2_b14.safetensors
  mim-jax convert runs/mae --to=timm --out=mae_b_timm.safetensors
  mim-jax convert runs/mae --to=hf-mae --out=mae_b_hf/
"""

TOLERANCE = 1e-4  # of features, relative to the largest entry where that exceeds 1; float32 over some dozens of layers


def add(parser):
  parser.add_argument('source', help="a run's folder, a file of weights, or a folder that holds one")
  parser.add_argument(
    '--out', required=True, help='file to write, or folder where the format has a config beside the weights'
  )
  parser.add_argument(
    '--to',
    default='mim_jax',
    help='format to write: mim_jax, timm, mae, dinov2, clip, hf-vit, hf-mae, hf-clip, hf-dinov2',
  )
  parser.add_argument('--format', default='', help='format of the source, when it is not to be found out')
  parser.add_argument(
    '--prefix', help='what comes before the names of the network to take, when the source holds several'
  )
  parser.add_argument('--image_size', metavar='SIDE|HEIGHT,WIDTH', help='resample the positions to images of this size')
  parser.add_argument('--heads', type=int, help='attention heads')
  parser.add_argument('--decoder_heads', type=int, help='attention heads of the decoder')
  parser.add_argument('--eps', type=float, help='of LayerNorm')
  parser.add_argument('--activation', choices=('gelu', 'gelu_tanh', 'quick_gelu'), help='of the MLPs')
  parser.add_argument('--stats', choices=('imagenet', 'clip', 'half', 'none'), help='how its images are normalised')


def run(args):
  from mim_jax import encoder
  from mim_jax.checkpoint import bundle as bundles
  from mim_jax.checkpoint import files
  from mim_jax.official.vits import check, formats
  from mim_jax.official.vits.layout import Hints

  if args.to != 'mim_jax':
    formats.layout_of(args.to)  # before anything is read
  source, size = Path(args.source), _size(args.image_size)
  same = True
  if encoder.is_run(source):
    bundle, layout = encoder.bundle_of_run(source), None
    print(f'read      {source}: step {bundle.source["step"]}, method {bundle.method["name"]}')
  else:
    hints = Hints(
      heads=args.heads,
      decoder_heads=args.decoder_heads,
      eps=args.eps,
      activation=args.activation,
      stats=args.stats,
      image_size=size,
    )
    bundle, layout, unknown, notes = formats.read(source, hints, args.format, args.prefix)
    file = files.locate(source)
    print(f'read      {file}: {layout.name if layout else "mim_jax"}, {_megabytes(files.size_on_disk(file))}')
    for note in notes:
      print(f'assumed   {note}' if '--' in note else f'note      {note}')
    if unknown:
      print(f'not taken {_some(unknown)}')
  print(f'encoder   {_words(bundle)}')

  image = check.images(bundle)
  mine = check.ours(bundle, image)
  if layout is not None:
    weights = files.read(source)
    prefix = args.prefix if args.prefix is not None else formats.preferred(layout.prefixes(weights))
    same &= _theirs(check, source, prefix, layout, bundle, image, mine)
  if size and size != bundle.image_size:
    was = bundle.image_size
    bundle = bundle.resized(size)
    image = check.images(bundle)
    mine = check.ours(bundle, image)
    print(f'resampled positions from images of {was} to {size}')

  if args.to == 'mim_jax':
    written, left = Path(args.out), []
    if written.suffix != '.safetensors':
      written = written / 'model.safetensors'
    bundles.write(written, bundle)
  else:
    written, left = formats.write(args.out, bundle, args.to)
  print(f'wrote     {written}: {args.to}, {_megabytes(files.size_on_disk(written))}')
  if left:
    print(f'left out  {", ".join(left)}, which {args.to} has no place for')

  again = formats.read(written, form=args.to if args.to != 'mim_jax' else '')[0]
  difference = check.compare(check.ours(again, image), {'tokens': mine['tokens']})['tokens']
  same &= difference <= TOLERANCE
  print(
    f'features  {len(image)} fixed images {list(image.shape[1:])} -> {list(mine["tokens"].shape)}: {_summary(mine["tokens"])}'
  )
  print(f'          read back from {written.name}: largest difference {difference:.1e}')
  if args.to != 'mim_jax':
    target = formats.layout_of(args.to)
    prefix = target.prefixes(files.read(written))[0]
    same &= _theirs(check, written, prefix, target, bundle, image, mine)
  return 0 if same else 1


def _theirs(check, path, prefix, layout, bundle, image, mine) -> bool:
  """Prints the comparison with the other library; False where the features differ."""
  other = check.theirs(path, prefix, layout, bundle, image)
  if isinstance(other, str):
    print(f'          not compared with the library of {layout.name}: {other}')
    return True
  rows = check.compare(mine, other)
  worst = max(rows.values())
  verdict = 'the same' if worst <= TOLERANCE else 'DIFFERENT'
  print(f'library   {layout.name}, same images: largest difference {worst:.1e} ({", ".join(rows)}): {verdict}')
  return worst <= TOLERANCE


def _size(text):
  from mim_jax.errors import UserError

  if text is None:
    return None
  try:
    sides = tuple(int(part) for part in text.split(','))
  except ValueError as error:
    raise UserError(f'--image_size={text} is neither a side such as 224 nor height,width') from error
  return sides * 2 if len(sides) == 1 else sides


def _words(bundle) -> str:
  e = bundle.encoder
  extras = [
    *([] if e['cls'] else ['no class token']),
    *([f'{e["registers"]} registers'] if e['registers'] else []),
    *(['layer scale'] if e['layer_scale'] else []),
    *(['norm before the blocks'] if e['embed_norm'] else []),
    *([] if e['qkv_bias'] else ['qkv without bias']),
    *([] if e['final_norm'] else ['no final norm']),
    *(sorted(set(bundle.params) - {'encoder'})),
  ]
  return ', '.join(
    [
      f'width {e["width"]}, depth {e["depth"]}, {e["heads"]} heads',
      f'patch {"x".join(map(str, e["patch"]))}, images {"x".join(map(str, bundle.image_size))}, {bundle.channels} channels',
      f'{e["pos"]} positions, {e["activation"]}, eps {e["eps"]:g}',
      *extras,
    ]
  )


def _summary(tokens) -> str:
  first = ' '.join(f'{value:.4f}' for value in tokens[0, 0, :3])
  return f'mean {tokens.mean():.5f}, std {tokens.std():.5f}, first {first}'


def _some(names, count: int = 4) -> str:
  return ', '.join(names[:count]) + (f' and {len(names) - count} more' if len(names) > count else '')


def _megabytes(size: int) -> str:
  return f'{size / 1e6:.1f} MB'
