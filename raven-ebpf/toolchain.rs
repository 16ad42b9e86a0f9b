//! Builds the eBPF object. Included by raven-agent's build script, which embeds the object, and by xtask.
//!
//! Two toolchains are supported: Debian's compiler with a prebuilt `core` for bpfel, and rustup's nightly, which builds
//! `core` from rust-src. Debian's is preferred; callers print which one is used.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// A toolchain that can build for `bpfel-unknown-none`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Toolchain {
    /// A stable compiler that ships `core` for bpfel (Debian's rustc-web with libstd-rust-web-dev-bpf).
    PrebuiltCore {
        /// Path of the compiler.
        rustc: PathBuf,
    },
    /// The nightly toolchain of rustup with the component rust-src.
    NightlyBuildStd,
}

impl std::fmt::Display for Toolchain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PrebuiltCore { rustc } => write!(f, "{} with its prebuilt core for bpfel", rustc.display()),
            Self::NightlyBuildStd => write!(f, "rustup's nightly, building core from rust-src"),
        }
    }
}

/// Target triple of the object.
pub(crate) const TARGET: &str = "bpfel-unknown-none";

/// Finds a toolchain. The environment variable `RAVEN_EBPF_RUSTC` can name a compiler with a prebuilt `core`.
/// The error lists the packages to install.
pub(crate) fn find() -> Result<Toolchain, String> {
    let candidates = env::var_os("RAVEN_EBPF_RUSTC").map(PathBuf::from).into_iter().chain(["/usr/bin/rustc".into()]);
    for rustc in candidates {
        if sysroot(&rustc).is_some_and(|root| root.join("lib/rustlib").join(TARGET).join("lib").is_dir()) {
            return Ok(Toolchain::PrebuiltCore { rustc });
        }
    }
    let nightly = Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]).output();
    if let Ok(output) = nightly
        && output.status.success()
        && Path::new(String::from_utf8_lossy(&output.stdout).trim()).join("lib/rustlib/src/rust/library/core").is_dir()
    {
        return Ok(Toolchain::NightlyBuildStd);
    }
    Err("no toolchain can build for bpfel-unknown-none. Run `cargo xtask setup`; or, by hand, on Debian \
         `apt-get install rustc-web libstd-rust-web-dev-bpf`, elsewhere `rustup toolchain install nightly --component rust-src`"
        .to_owned())
}

fn sysroot(rustc: &Path) -> Option<PathBuf> {
    let output = Command::new(rustc).args(["--print", "sysroot"]).output().ok()?;
    output.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

/// Returns the folder in which `cargo xtask setup` installs tools.
pub(crate) fn tools_dir() -> PathBuf {
    let cache = env::var_os("XDG_CACHE_HOME").map_or_else(
        || PathBuf::from(env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache"),
        PathBuf::from,
    );
    cache.join("raven/tools/bin")
}

/// Returns the command that builds `raven-ebpf` of `workspace` into `target_dir`; [`object`] is the path of the result.
/// With `trace`, the programs write a log line for each packet.
pub(crate) fn command(toolchain: &Toolchain, workspace: &Path, target_dir: &Path, trace: bool) -> Command {
    let mut cargo = match toolchain {
        Toolchain::PrebuiltCore { rustc } => {
            let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            // aya-ebpf needs unstable language features, which RUSTC_BOOTSTRAP enables in a stable compiler.
            cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1").arg("build");
            cargo
        }
        Toolchain::NightlyBuildStd => {
            let mut cargo = Command::new("rustup");
            cargo.args(["run", "nightly", "cargo", "build", "-Z", "build-std=core"]).env_remove("RUSTC");
            cargo
        }
    };
    let mut path = vec![tools_dir()];
    path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    if let Ok(path) = env::join_paths(path) {
        cargo.env("PATH", path);
    }
    // A parent cargo's settings apply to the host's target, not to bpfel.
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTUP_TOOLCHAIN"]
    {
        cargo.env_remove(name);
    }
    cargo
        .current_dir(workspace)
        .args(["--package", "raven-ebpf", "--release", "--target", TARGET, "--target-dir"])
        .arg(target_dir)
        .args(if trace { &["--features", "trace"][..] } else { &[] })
        .env("CARGO_ENCODED_RUSTFLAGS", flags(workspace).join("\u{1f}"));
    cargo
}

/// Returns the compiler's flags. The object does not depend on the paths of the checkout and of cargo's folder: the
/// BTF's line information names sources relative to the workspace, where bpf-linker runs and finds their text.
fn flags(workspace: &Path) -> Vec<String> {
    // BTF of maps and programs lets bpftool show fields by name.
    let mut flags =
        ["-Cdebuginfo=2", "-Clink-arg=--btf", "-Clinker=bpf-linker", "-Dwarnings"].map(str::to_owned).to_vec();
    flags.push(format!("--remap-path-prefix={}=.", workspace.display()));
    flags.extend(cargo_home().map(|home| format!("--remap-path-prefix={}=/cargo", home.display())));
    flags
}

/// Returns the folder in which cargo unpacks the sources of dependencies.
pub(crate) fn cargo_home() -> Option<PathBuf> {
    let default = || Some(PathBuf::from(env::var_os("HOME")?).join(".cargo"));
    env::var_os("CARGO_HOME").map(PathBuf::from).or_else(default)
}

/// Returns the path of the object that [`command`] builds.
pub(crate) fn object(target_dir: &Path) -> PathBuf {
    target_dir.join(TARGET).join("release/raven")
}
