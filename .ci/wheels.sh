# Sections of .ci/run about wheels: README's recipes, and the AArch64 wheel in an AArch64 Python.

# recipe NAME: README's commands, in the unpacked source distribution.
recipe() {
  local commands
  commands=$(readme_block "$1")
  note "README.md says:"
  printf '%s\n' "$commands"
  (cd "$SDIST" && bash -euo pipefail -c "$commands" >"$WORK/wheel.log" 2>&1) ||
    { cat "$WORK/wheel.log"; return 1; }
}

# audit FOLDER: auditwheel must accept the wheel that a recipe made in $SDIST/dist/FOLDER, which must
# be small and bring no library; the one that auditwheel writes goes to $DIST/FOLDER.
audit() {
  local wheel bytes
  rm -rf "${DIST:?}/$1"
  PATH=$WORK/tools/bin:$PATH auditwheel repair --wheel-dir "$DIST/$1" "$SDIST/dist/$1"/*.whl \
    >"$WORK/auditwheel.log" 2>&1 || { cat "$WORK/auditwheel.log"; return 1; }
  wheel=$(ls "$DIST/$1"/*.whl)
  bytes=$(stat -c %s "$wheel")
  note "$1: $(basename "$wheel"), $bytes bytes, extension $(stat -c %s "$(extension "$wheel")")"
  [[ $wheel == *-manylinux_* ]] || { echo "not a manylinux wheel" >&2; return 1; }
  ((bytes < 2000000)) || { echo "too large" >&2; return 1; }
  if unzip -l "$wheel" | grep -F .libs/; then
    echo "it brings a library of its own" >&2
    return 1
  fi
}

# extension WHEEL: the path of its extension, unpacked.
extension() {
  local folder
  folder=$(mktemp -d -p "$WORK")
  unzip -q "$1" 'lowbit/_core.*' -d "$folder"
  echo "$folder"/lowbit/_core.*.so
}

# refuses WHEEL COMMAND...: the Python COMMAND, on an emulated CPU that is too old for the wheel,
# must hear from the extension what the CPU lacks.
refuses() {
  local path message
  path=$(extension "$1")
  shift
  if message=$("$@" "$SRC/tests/golden.py" "$path" any 2>&1); then
    echo "imported, although the CPU is too old" >&2
    return 1
  fi
  message=$(tail -n 1 <<<"$message")
  note "$message"
  [[ $message == "ImportError: this build of lowbit needs a CPU with "*"this one lacks: "* ]]
}

# rejects VARIABLE NAME: CMake must say which ISA it does not know, and which it knows.
rejects() {
  local message
  if message=$(cmake -S "$SRC" -B "$(mktemp -d -p "$WORK")" -G Ninja -DLOWBIT_BUILD_PYTHON=OFF \
    "-D$1=$2" 2>&1); then
    echo "$1=$2 was taken" >&2
    return 1
  fi
  tr -s ' \n' ' ' <<<"$message" | grep -o "$1: '[a-z0-9]*' is unknown.*known: [a-z0-9;]*scalar"
}

wheels() {
  rejects LOWBIT_CPU_DISPATCH 'scalar;sse9'
  rejects LOWBIT_CPU_BASELINE sse9

  [[ $(uname -m) == x86_64 ]] || { note "not on x86-64"; return; }
  rm -rf "$SDIST/dist"
  recipe wheels
  local name dist=$SDIST/dist python=$VENV/bin/python
  for name in all avx2 avx512vnni; do
    audit "$name"
  done
  unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE  # NumPy's BLAS must choose for the emulated CPU, too
  refuses "$dist"/avx2/*.whl env QEMU_CPU=Nehalem qemu-x86_64 "$python"
  refuses "$dist"/avx512vnni/*.whl env QEMU_CPU=Nehalem qemu-x86_64 "$python"
  refuses "$dist"/avx512vnni/*.whl env "QEMU_CPU=$HASWELL" qemu-x86_64 "$python"
  QEMU_CPU=$HASWELL qemu-x86_64 "$python" "$SRC/tests/golden.py" "$(extension "$dist"/avx2/*.whl)" avx2
}

# The package in an AArch64 Python, with the oldest torch that it takes: files from here there and
# back, and tests of each layer from the kernels to the file format.
aarch64_python() {
  "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    { echo "needs Python 3.11, as Debian 12 has it for AArch64" >&2; return 1; }
  local wheel folder=$SDIST/build/aarch64
  rm -rf "$folder" "$SDIST/dist/aarch64" "$SDIST/dist/neondot"
  recipe wheel-aarch64
  audit aarch64
  wheel=$(ls "$DIST"/aarch64/*.whl)

  local site platforms=() platform
  site=$(echo "$folder"/lib/python3.*/site-packages)
  for platform in manylinux_2_{17,24,26,27,28,31,34,35,36,39}_aarch64 manylinux2014_aarch64; do
    platforms+=(--platform "$platform")
  done
  # Without their dependencies, which pip would choose for the machine that it runs on.
  grep -v '^torch==' "$SRC/.ci/constraints.txt" >"$WORK/constraints-aarch64.txt"
  "$VENV/bin/pip" install -q --no-deps --only-binary=:all: --target "$site" "${platforms[@]}" \
    -c "$WORK/constraints-aarch64.txt" "$wheel" torch==2.6.0 sympy==1.13.1 numpy safetensors \
    tabulate tqdm filelock fsspec jinja2 markupsafe mpmath networkx typing_extensions \
    pytest hypothesis expecttest sortedcontainers iniconfig pluggy packaging pygments

  local emulated=$folder/bin/python
  cd "$WORK"
  QEMU_CPU=max "$emulated" -m lowbit.cli info
  "$VENV/bin/python" "$SRC/tests/saved.py" --write "$WORK/saved/x86"
  QEMU_CPU=max "$emulated" "$SRC/tests/saved.py" --check "$WORK/saved/x86"
  QEMU_CPU=cortex-a72 "$emulated" "$SRC/tests/saved.py" --write "$WORK/saved/aarch64"
  "$VENV/bin/python" "$SRC/tests/saved.py" --check "$WORK/saved/aarch64"

  note "tests, on two processes"
  emulated_tests kernels tests/test_golden.py tests/test_openmp.py tests/test_pack.py \
    -k 'not test_oracle' &
  local kernels=$!
  local failed=0
  emulated_tests layers tests/nn/test_linear.py tests/test_serialize_file.py -k 'not inductor' ||
    failed=1
  wait "$kernels"
  ((failed == 0))

  note "a wheel for newer CPUs"
  local newer='-C cmake.define.LOWBIT_CPU_DISPATCH=neondot -C cmake.define.LOWBIT_CPU_BASELINE=neondot'
  readme_block wheel-aarch64 | sed "s|-w dist/aarch64|-w dist/neondot|; 1d; \$ s|\$| $newer|" \
    >"$WORK/neondot"
  (cd "$SDIST" && bash -euo pipefail "$WORK/neondot" >"$WORK/wheel.log" 2>&1) ||
    { cat "$WORK/wheel.log"; return 1; }
  refuses "$SDIST"/dist/neondot/*.whl env QEMU_CPU=cortex-a72 "$emulated"
}

# emulated_tests NAME PYTEST-ARGUMENT...
emulated_tests() {
  local name=$1
  shift
  cd "$SDIST"
  LOWBIT_TEST_EXAMPLES=5 QEMU_CPU=max build/aarch64/bin/python -m pytest -q "$@" \
    -p no:cacheprovider --junitxml="$RESULTS/aarch64-$name.xml" >"$WORK/aarch64-$name.log" 2>&1 ||
    { cat "$WORK/aarch64-$name.log"; return 1; }
  tail -n 1 "$WORK/aarch64-$name.log"
}
