//! How the eBPF object is compiled: included by raven-agent's build script (which embeds the object) and by xtask.
//!
//! Two toolchains can do it. Debian ships a compiler with a prebuilt `core` for bpfel; elsewhere rustup's nightly builds
//! `core` from rust-src. Whichever is there is taken, and said.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// A toolchain that can build for `bpfel-unknown-none`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Toolchain {
    /// A stable compiler that ships `core` for bpfel (Debian's rustc-web with libstd-rust-web-dev-bpf).
    PrebuiltCore {
        /// The compiler.
        rustc: PathBuf,
    },
    /// rustup's nightly with the component rust-src.
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

/// The target triple.
pub const TARGET: &str = "bpfel-unknown-none";

/// Finds a toolchain; the error says what to install. `RAVEN_EBPF_RUSTC` names a compiler of the first kind by hand.
pub fn find() -> Result<Toolchain, String> {
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

/// Where `xtask setup` puts tools that it builds.
pub fn tools_dir() -> PathBuf {
    let cache = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache"));
    cache.join("raven/tools/bin")
}

/// The command that builds `raven-ebpf` (in `workspace`) into `target_dir`; the object is then [`object`]. With `trace`, its programs
/// write a line of log for each packet.
pub fn command(toolchain: &Toolchain, workspace: &Path, target_dir: &Path, trace: bool) -> Command {
    let mut cargo = match toolchain {
        Toolchain::PrebuiltCore { rustc } => {
            let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            // aya-ebpf needs unstable features of the language; the compiler is a stable one.
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
    // A parent cargo's settings are for the host's build, not for this one.
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTUP_TOOLCHAIN"] {
        cargo.env_remove(name);
    }
    cargo
        .current_dir(workspace)
        .args(["--package", "raven-ebpf", "--release", "--target", TARGET, "--target-dir"])
        .arg(target_dir)
        .args(if trace { &["--features", "trace"][..] } else { &[] })
        // BTF for maps and programs, so that bpftool shows fields by name.
        .env("CARGO_ENCODED_RUSTFLAGS", "-Cdebuginfo=2\u{1f}-Clink-arg=--btf\u{1f}-Clinker=bpf-linker\u{1f}-Dwarnings");
    cargo
}

/// The object that [`command`] leaves.
pub fn object(target_dir: &Path) -> PathBuf {
    target_dir.join(TARGET).join("release/raven")
}
