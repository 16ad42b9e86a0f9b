//! Parses the command line, sets up logging and runs a command. The exit status is 0 on success.

#![forbid(unsafe_code)]

use std::{fs::OpenOptions, process::ExitCode, time::Duration};

use clap::Parser;
use raven_agent::{
    app, cleanup,
    config::{Cli, Command, LogFormat, Run},
    tunnel::{self, engine},
};
use tracing_subscriber::EnvFilter;

/// Pause between two cleanups of a Pod that stays.
const CLEANUP_INTERVAL: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let cli = Cli::parse();
    log(cli.run.log_format);
    let result = match cli.command {
        Some(Command::Engine { device }) => {
            with_runtime(async move { Ok(engine::run(&device, engine::Device::Temporary, terminated()).await?) })
        }
        Some(Command::Wireguard { check }) => {
            silence_stdout();
            with_runtime(async move {
                if check {
                    return Ok(tunnel::check_engine().await?);
                }
                Ok(engine::serve(terminated()).await?)
            })
        }
        Some(Command::Cleanup { keep_state, stay }) => with_runtime(async {
            clean(&cli.run, keep_state).await?;
            if stay {
                println!("nothing of Raven is left on this node");
                tokio::select! {
                    ended = app::terminated() => ended?,
                    failed = clean_repeatedly(&cli.run, keep_state) => failed?,
                }
            }
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
            tracing::error!(error = format!("{e:#}"), "the agent failed");
            ExitCode::FAILURE
        }
    }
}

/// Completes on SIGTERM, which the first process of a container ignores without a handler.
async fn terminated() {
    if let Err(e) = app::terminated().await {
        tracing::error!(error = format!("{e:#}"), "cannot wait for SIGTERM; only SIGKILL ends this process");
        std::future::pending::<()>().await;
    }
}

async fn clean(settings: &Run, keep_state: bool) -> anyhow::Result<()> {
    let (removed, failed) =
        cleanup::run(&settings.state_dir, settings.boot_unit_dir.as_deref(), keep_state, settings.wireguard_engine)
            .await;
    removed.iter().for_each(|what| println!("removed {what}"));
    failed.iter().for_each(|what| eprintln!("cannot remove {what}"));
    anyhow::ensure!(failed.is_empty(), "{} objects could not be removed", failed.len());
    Ok(())
}

/// Pods of the agent and of the engine that still terminate may create objects after the first cleanup. Returns the
/// first failure.
async fn clean_repeatedly(settings: &Run, keep_state: bool) -> anyhow::Result<()> {
    loop {
        tokio::time::sleep(CLEANUP_INTERVAL).await;
        clean(settings, keep_state).await?;
    }
}

/// The control runtime: watches, reconciler, status and metrics. The proxy has its own ([`app`]).
fn with_runtime(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("control").enable_all().build()?;
    let result = runtime.block_on(work);
    // Without waiting for lookups of names, which block a thread.
    runtime.shutdown_background();
    result
}

/// Logs to stderr; stdout is for the output of commands.
fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}

/// Raises the limit of open files to the maximum: a proxy stream uses two sockets, and container runtimes start
/// programs with a limit of 1,024.
fn raise_file_limit() {
    use nix::sys::resource::{Resource::RLIMIT_NOFILE, getrlimit, setrlimit};
    let raised = getrlimit(RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(RLIMIT_NOFILE, hard, hard));
    if let Err(e) = raised {
        tracing::warn!(error = %e, "cannot raise the limit of open files; the number of concurrent proxy streams is limited");
    }
}

/// Redirects stdout to /dev/null: `wireguard-control` prints a line for each field that it does not know, and for each
/// error.
fn silence_stdout() {
    if let Ok(null) = OpenOptions::new().write(true).open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(null);
    }
}
