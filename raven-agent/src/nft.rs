//! Runs nft within limits of time and output: it needs seconds where other programs have thousands of rules.

use std::{
    io,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use ipnet::IpNet;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    time::timeout,
};

/// Time limit of one call.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest output of one call that is read, in bytes: the names of the chains of 5,000 Services take 1.3 MB.
const LONGEST: u64 = 8 << 20;
/// Longest error message that is read, in bytes.
const LONGEST_ERROR: u64 = 4 << 10;

/// A call of nft that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// nft is not installed, or a pipe to it broke.
    #[error("nft {command}: {source}")]
    Run {
        /// The arguments.
        command: String,
        /// Error of the system.
        source: io::Error,
    },
    /// nft did not end in time.
    #[error("nft {command}: no result after {} s", LIMIT.as_secs())]
    Timeout {
        /// The arguments.
        command: String,
    },
    /// The output is too long.
    #[error("nft {command}: more than {LONGEST} bytes of output")]
    TooLong {
        /// The arguments.
        command: String,
    },
    /// nft refused the command.
    #[error("nft {command}: {status}: {message}")]
    Refused {
        /// The arguments.
        command: String,
        /// Exit status of nft.
        status: ExitStatus,
        /// Its error message.
        message: String,
    },
    /// The output is not JSON.
    #[error("nft {command}: {source}")]
    Output {
        /// The arguments.
        command: String,
        /// Error of the parser.
        source: serde_json::Error,
    },
}

/// Runs `nft -j` with these arguments and returns its output (libnftables-json(5)).
pub(crate) async fn list(args: &[&str]) -> Result<Value, Error> {
    let command = format!("-j {}", args.join(" "));
    let output = run(&[&["-j"], args].concat(), "", &command).await?;
    serde_json::from_slice(&output).map_err(|source| Error::Output { command, source })
}

/// Applies a ruleset (libnftables-json(5)) in one transaction.
pub(crate) async fn apply(ruleset: &Value) -> Result<(), Error> {
    run(&["-j", "-f", "-"], &ruleset.to_string(), "-j -f -").await.map(drop)
}

/// The objects of one kind ("chain", "rule", "set") in a listed ruleset.
pub(crate) fn objects<'a>(ruleset: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    ruleset["nftables"].as_array().into_iter().flatten().filter_map(move |object| object.get(kind))
}

/// A field of an object; `?` if it is missing.
pub(crate) fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    object[key].as_str().unwrap_or("?")
}

/// The prefix of an expression `{"prefix": {"addr": …, "len": …}}`.
pub(crate) fn prefix(expression: &Value) -> Option<IpNet> {
    let prefix = expression.get("prefix")?;
    IpNet::new(prefix["addr"].as_str()?.parse().ok()?, u8::try_from(prefix["len"].as_u64()?).ok()?).ok()
}

async fn run(args: &[&str], input: &str, command: &str) -> Result<Vec<u8>, Error> {
    let command = || command.to_owned();
    let failed = |source| Error::Run { command: command(), source };
    let mut nft = Command::new("nft");
    nft.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = nft.spawn().map_err(failed)?;
    match timeout(LIMIT, converse(&mut child, input)).await {
        Err(_) => Err(Error::Timeout { command: command() }),
        Ok(Err(source)) => Err(failed(source)),
        Ok(Ok(None)) => Err(Error::TooLong { command: command() }),
        Ok(Ok(Some((status, output, _)))) if status.success() => Ok(output),
        Ok(Ok(Some((status, _, message)))) => {
            let message = String::from_utf8_lossy(&message).trim().to_owned();
            Err(Error::Refused { command: command(), status, message })
        }
    }
}

/// Returns exit status, output and error message; `None` if the output is too long.
async fn converse(child: &mut Child, input: &str) -> io::Result<Option<(ExitStatus, Vec<u8>, Vec<u8>)>> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let write = async {
        // nft that fails early closes the pipe; its message is more useful than EPIPE.
        if let Some(mut stdin) = stdin {
            _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let ((), output, message) =
        tokio::join!(write, read_limited(stdout, LONGEST + 1), read_limited(stderr, LONGEST_ERROR));
    let (output, message) = (output?, message?);
    if output.len() as u64 > LONGEST {
        return Ok(None);
    }
    Ok(Some((child.wait().await?, output, message)))
}

async fn read_limited(pipe: Option<impl AsyncRead + Unpin>, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(limit).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}
