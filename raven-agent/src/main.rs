//! Arguments → logging → what was asked for; exit status 0 if it was done.

#![forbid(unsafe_code)]

use std::{fs::OpenOptions, process::ExitCode};

use clap::Parser;
use raven_agent::{
    app, cleanup,
    config::{Cli, Command, LogFormat},
    tunnel::engine,
};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    log(cli.run.log_format);
    let result = match cli.command {
        Some(Command::Engine { device }) => engine::run(&device).map_err(anyhow::Error::from),
        Some(Command::Cleanup { keep_state }) => with_runtime(async {
            let (removed, failed) = cleanup::run(&cli.run.state_dir, keep_state).await;
            removed.iter().for_each(|what| println!("removed {what}"));
            failed.iter().for_each(|what| eprintln!("not removed: {what}"));
            anyhow::ensure!(failed.is_empty(), "{} things are left", failed.len());
            Ok(())
        }),
        None => {
            silence_stdout();
            raise_file_limit();
            with_runtime(app::run(cli.run))
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn with_runtime(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(work)
}

/// To stderr: stdout belongs to answers.
fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}

/// Every stream is two sockets, and container runtimes start programs with 1,024 (systemd's soft limit): as many as may be had.
fn raise_file_limit() {
    use nix::sys::resource::{Resource::RLIMIT_NOFILE, getrlimit, setrlimit};
    let raised = getrlimit(RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(RLIMIT_NOFILE, hard, hard));
    if let Err(e) = raised {
        tracing::warn!("raise the limit of open files: {e}; many streams at once may not be had");
    }
}

/// `wireguard-control` prints a line to stdout for each field that it does not know, and boringtun sends one with every
/// answer: a running agent would write it for ever.
fn silence_stdout() {
    if let Ok(null) = OpenOptions::new().write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(null);
    }
}
