"""JPEGs to training batches by tf.data on one core: a peer of benchmarks/input_pipeline.py. Needs tensorflow alone.

  python benchmarks/peers/tf_data.py FOLDER --batch 64 --seconds 10

`tf.io.read_file`, a crop of (0.2, 1.0) of the area and 3/4 to 4/3 of aspect by `sample_distorted_bounding_box`, decoded alone by
`decode_and_crop_jpeg`, resized to 224 (`--method`, `--antialias`), flipped, normalised to float32, batched, with prefetch; one thread of its
own for the data set, one for operations. The process is pinned to the first core that it may use.

Prints `images_per_second N`.
"""

import os

os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '-1')

import tensorflow as tf  # noqa: E402
import timing  # noqa: E402

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def main():
  parser = timing.arguments(__doc__)
  parser.add_argument('--method', default='bicubic', choices=('bicubic', 'bilinear'))
  parser.add_argument('--antialias', action='store_true', help='widen the kernel when shrinking, as Pillow does')
  args = parser.parse_args()
  tf.config.threading.set_inter_op_parallelism_threads(1)
  tf.config.threading.set_intra_op_parallelism_threads(1)

  mean, std = (tf.constant(values) * 255 for values in (MEAN, STD))

  def example(path):
    data = tf.io.read_file(path)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      tf.io.extract_jpeg_shape(data),
      tf.zeros([0, 0, 4], tf.float32),
      aspect_ratio_range=(3 / 4, 4 / 3),
      area_range=(0.2, 1.0),
      max_attempts=10,
      use_image_if_no_bounding_boxes=True,
    )
    window = tf.stack([begin[0], begin[1], size[0], size[1]])
    image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
    image = tf.image.resize(image, (args.size, args.size), method=args.method, antialias=args.antialias)
    image = tf.image.random_flip_left_right(tf.clip_by_value(image, 0, 255))
    return (image - mean) / std

  paths = sorted(str(path) for path in args.folder.rglob('*') if path.suffix.lower() in ('.jpg', '.jpeg'))
  data = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths), seed=0).repeat()
  data = data.map(example, num_parallel_calls=1, deterministic=True).batch(args.batch, drop_remainder=True).prefetch(2)
  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  options.threading.max_intra_op_parallelism = 1
  made = timing.measure(iter(data.with_options(options)), args)
  assert made.shape == (args.batch, args.size, args.size, 3) and made.dtype == tf.float32


if __name__ == '__main__':
  main()
