//! `cargo xtask fuzz`: runs libFuzzer on code that parses untrusted input. Works on stable Rust, because the coverage
//! instrumentation of libFuzzer is an ordinary LLVM pass.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};

use crate::{
    progress,
    setup::{self, Need},
    workspace,
};

/// Arguments of `fuzz`.
#[derive(clap::Args)]
pub(crate) struct Fuzz {
    /// Fuzz only this target.
    target: Option<String>,
    /// Fuzz each target for this number of seconds.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// Flags of cargo-fuzz without a sanitizer, which requires nightly; the fuzzed code is safe Rust.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

const HOST: &str = "x86_64-unknown-linux-gnu";

impl Fuzz {
    /// Builds and runs the targets. Fails if a target finds a defect, whose input is then in `target/fuzz/artifacts/`.
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure(&[Need::Build, Need::Ebpf])?;
        let folder = workspace().join("tests/fuzz");
        let target = workspace().join("target/fuzz");
        // With an explicit target, build scripts and macros are built with their usual flags.
        let mut cargo = raven_tests::cargo::command();
        cargo.args(["build", "--release", "--target", HOST, "--manifest-path"]).arg(folder.join("Cargo.toml"));
        cargo.env("CARGO_TARGET_DIR", &target).env("RUSTFLAGS", FLAGS);
        progress::run("building the fuzz targets", &mut cargo)?;
        let names = match self.target {
            Some(name) => vec![name],
            None => names(&folder)?,
        };
        for name in names {
            let (corpus, artifacts) = (target.join("corpus").join(&name), target.join("artifacts").join(&name));
            fs::create_dir_all(&corpus)?;
            fs::create_dir_all(&artifacts)?;
            println!("\n=== fuzz {name}, {} s ===", self.seconds);
            let mut fuzzer = Command::new(target.join(HOST).join("release").join(&name));
            fuzzer.arg(&corpus).args([folder.join("corpus").join(&name)].iter().filter(|seeds| seeds.is_dir()));
            fuzzer.args([
                format!("-max_total_time={}", self.seconds),
                format!("-artifact_prefix={}/", artifacts.display()),
            ]);
            fuzzer.args(["-print_final_stats=1", "-verbosity=0", "-rss_limit_mb=2048", "-timeout=10"]);
            let status = fuzzer.status().with_context(|| format!("start fuzz target {name}"))?;
            ensure!(status.success(), "fuzz target {name} found a defect: see {}", artifacts.display());
        }
        Ok(())
    }
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let files = fs::read_dir(folder.join("fuzz_targets")).with_context(|| format!("list {}", folder.display()))?;
    let mut names: Vec<String> =
        files.flatten().filter_map(|file| Some(file.path().file_stem()?.to_string_lossy().into_owned())).collect();
    names.sort();
    Ok(names)
}
