//! `cargo xtask fuzz`: runs libFuzzer on code that parses untrusted input. Works on stable Rust, because the coverage
//! instrumentation of libFuzzer is an ordinary LLVM pass.

use std::{env, fs, path::Path, process::Command, thread};

use anyhow::{Context, Result};

use crate::{
    build,
    progress::{self, Task},
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

impl Fuzz {
    /// Builds and runs the targets, as many at a time as there are processors. Fails if a target finds a defect, whose
    /// input is then in `target/fuzz/artifacts/`.
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure(&[Need::Build, Need::Ebpf])?;
        let folder = workspace().join("tests/fuzz");
        // Only the workspace's own crates are instrumented: other crates are those of every other build.
        let mut cargo = build::cargo_build(&["-p", "raven-fuzz"]);
        cargo.env("RUSTC_WORKSPACE_WRAPPER", folder.join("instrument"));
        progress::run("building the fuzz targets", &mut cargo)?;
        let names = match self.target {
            Some(name) => vec![name],
            None => names(&folder)?,
        };
        let lanes = thread::available_parallelism().map_or(1, usize::from);
        let mut tasks: Vec<Vec<Task>> = (0..lanes).map(|_| Vec::new()).collect();
        for (name, lane) in names.into_iter().zip((0..lanes).cycle()) {
            let seconds = self.seconds;
            tasks[lane].push(Task::new(format!("fuzzing {name} for {seconds} s"), move |_| fuzz(&name, seconds)));
        }
        progress::parallel(tasks)
    }
}

fn fuzz(name: &str, seconds: u32) -> Result<()> {
    let target = workspace().join("target/fuzz");
    let (corpus, artifacts) = (target.join("corpus").join(name), target.join("artifacts").join(name));
    fs::create_dir_all(&corpus)?;
    fs::create_dir_all(&artifacts)?;
    let executable = env::current_exe()?.with_file_name(name);
    let mut fuzzer = Command::new(executable);
    fuzzer.arg(&corpus).args([workspace().join("tests/fuzz/corpus").join(name)].iter().filter(|seeds| seeds.is_dir()));
    fuzzer.args([format!("-max_total_time={seconds}"), format!("-artifact_prefix={}/", artifacts.display())]);
    fuzzer.args(["-print_final_stats=1", "-verbosity=0", "-rss_limit_mb=2048", "-timeout=10"]);
    progress::logged(&mut fuzzer)
        .with_context(|| format!("fuzz target {name} found a defect: see {}", artifacts.display()))
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let files = fs::read_dir(folder.join("fuzz_targets")).with_context(|| format!("list {}", folder.display()))?;
    let mut names: Vec<String> =
        files.flatten().filter_map(|file| Some(file.path().file_stem()?.to_string_lossy().into_owned())).collect();
    names.sort();
    Ok(names)
}
