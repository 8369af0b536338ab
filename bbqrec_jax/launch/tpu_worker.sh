#!/usr/bin/env bash
# What every worker of a TPU VM does.
#   tpu_worker.sh install BUCKET      mounts the bucket at /mnt/bbqrec and installs the project
#   tpu_worker.sh start ARGUMENT..    starts Python with these arguments, as a service
# Services outlive the login that starts them. At shutdown systemd sends the program SIGTERM, on which it saves, and
# keeps the storage until the program has ended.
set -euo pipefail

mount_point=/mnt/bbqrec
project=$HOME/bbqrec_jax
environment=$HOME/bbqrec_env

fail() {
  echo "error: $(hostname): $*" >&2
  exit 1
}

install_gcsfuse() {
  local keyring=/usr/share/keyrings/cloud.google.asc repository=https://packages.cloud.google.com/apt
  curl --fail --silent --show-error "$repository/doc/apt-key.gpg" | sudo tee "$keyring" >/dev/null
  echo "deb [signed-by=$keyring] $repository gcsfuse-$(lsb_release --codename --short) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  # For a while after the first boot, Ubuntu's own upgrades hold the lock.
  sudo apt-get -o DPkg::Lock::Timeout=600 update
  sudo apt-get -o DPkg::Lock::Timeout=600 install --yes gcsfuse
}

mount_bucket() {
  command -v gcsfuse >/dev/null || install_gcsfuse
  # Without caches of what exists: the other workers write there too.
  sudo systemd-run --unit=bbqrec-storage --collect --service-type=forking --uid="$(id -u)" --gid="$(id -g)" \
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$1" "$mount_point"
}

install_project() {
  # The images' own Python is older than the project's.
  python3 -m pip install --quiet --user uv
  local uv=$HOME/.local/bin/uv
  [[ -x $environment/bin/python ]] || "$uv" venv --quiet --python=3.12 "$environment"
  "$uv" pip install --quiet --python="$environment/bin/python" --editable "${project}[tpu]"
}

start() {
  # In the arguments of a service $ begins a variable, and $$ is a $.
  sudo systemd-run --unit=bbqrec --collect --service-type=exec --uid="$(id -u)" --gid="$(id -g)" \
    --working-directory="$project" --property=After=bbqrec-storage.service \
    --property=RequiresMountsFor="$mount_point" --property=LimitMEMLOCK=infinity --property=TimeoutStopSec=300 \
    "$environment/bin/python" "${@//\$/\$\$}"
}

case $1 in
  install)
    if ! mountpoint --quiet "$mount_point"; then
      sudo install --directory --owner="$(id -u)" --group="$(id -g)" "$mount_point"
      mount_bucket "$2"
    fi
    install_project
    ;;
  start)
    mountpoint --quiet "$mount_point" || fail "nothing is mounted at $mount_point: install first"
    start "${@:2}"
    ;;
  *) fail "tpu_worker.sh install or tpu_worker.sh start, got $1" ;;
esac
