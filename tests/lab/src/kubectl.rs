//! Runs kubectl commands against a pod at an edge. Each function checks one command and returns a
//! summary of the result.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::kubelet::SecondApiServer;
use crate::patience;
use crate::proof::Check;

/// Script of the pod [`POD`]: prints a line every 0.2 s and runs an HTTP server.
pub const SCRIPT: &str = "mkdir -p /www; echo served > /www/index.html; httpd -p 127.0.0.1:8088 -h /www; i=0; while true; do echo line $i; i=$((i+1)); sleep 0.2; done";
/// Name of the pod that all checks use.
pub const POD: &str = "probe";

/// Time limit for expected output to appear.
const OUTPUT_WITHIN: Duration = Duration::from_secs(30);
/// Time limit for one kubectl command, such as `cp` of 100 MB with a tar at either end on a busy machine.
const COMMAND_WITHIN: Duration = Duration::from_secs(180);

/// Streaming protocol of kubectl.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Default since Kubernetes 1.31.
    WebSocket,
    /// Default before Kubernetes 1.31.
    Spdy,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::WebSocket => "WebSocket",
            Self::Spdy => "SPDY",
        })
    }
}

impl Protocol {
    fn set(self, command: &mut Command) {
        if self == Self::Spdy {
            command.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "false").env("KUBECTL_PORT_FORWARD_WEBSOCKETS", "false");
        }
    }
}

/// Runs all checks against one API server. `path` describes it in the checks' names; `megabytes` is the
/// size for `kubectl cp`.
pub fn all(server: &SecondApiServer, path: &str, megabytes: usize) -> Vec<Check> {
    let mut checks = vec![
        Check::new(format!("kubectl logs, {path}"), logs(server)),
        Check::new(format!("kubectl logs -f, {path}"), follow(server)),
        Check::new(format!("kubectl get --raw …/proxy/metrics, {path}"), metrics(server)),
        Check::new(format!("kubectl cp of {megabytes} MB, {path}"), cp(server, megabytes)),
    ];
    for protocol in [Protocol::WebSocket, Protocol::Spdy] {
        checks.push(Check::new(format!("kubectl exec with stdin, {protocol}, {path}"), exec(server, protocol)));
        checks.push(Check::new(format!("kubectl exec -it, resized, {protocol}, {path}"), terminal(server, protocol)));
        checks.push(Check::new(format!("kubectl attach, {protocol}, {path}"), attach(server, protocol)));
        checks.push(Check::new(format!("kubectl port-forward, {protocol}, {path}"), port_forward(server, protocol)));
    }
    checks
}

/// Checks `kubectl logs --tail`.
pub fn logs(server: &SecondApiServer) -> Result<String> {
    let text = run(&mut server.kubectl(&["logs", POD, "--tail=3"]), "")?;
    ensure!(text.lines().count() == 3 && text.lines().all(|l| l.starts_with("line ")), "unexpected output {text:?}");
    Ok(format!("{:?}", text.lines().last().unwrap_or_default()))
}

/// Checks that `kubectl logs -f` streams lines without a gap.
pub fn follow(server: &SecondApiServer) -> Result<String> {
    let mut child =
        server.kubectl(&["logs", "-f", POD, "--tail=1"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let lines = BufReader::new(child.stdout.take().context("kubectl has no standard output")?).lines();
    let (begin, mut seen) = (Instant::now(), Vec::new());
    let guard = Guard::new(&child)?;
    for line in lines.take(8) {
        seen.push(line?);
    }
    let _ = child.kill();
    let _ = child.wait();
    drop(guard);
    let numbers: Vec<u64> = seen.iter().filter_map(|l| l.strip_prefix("line ")?.parse().ok()).collect();
    ensure!(numbers.len() == 8 && numbers.windows(2).all(|w| w[1] == w[0] + 1), "unexpected output {seen:?}");
    ensure!(begin.elapsed() > Duration::from_millis(900), "eight lines arrived at once, not as a stream");
    Ok(format!("8 lines in {:.1} s, none missing", begin.elapsed().as_secs_f64()))
}

/// Checks `kubectl exec -i`: both directions, half-close and the exit status.
pub fn exec(server: &SecondApiServer, protocol: Protocol) -> Result<String> {
    let mut command = server.kubectl(&["exec", "-i", POD, "--", "/bin/sh", "-c", "sha256sum; exit 7"]);
    protocol.set(&mut command);
    let sent: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let (text, status) = run_with(&mut command, &sent)?;
    let sum: String = Sha256::digest(&sent).iter().map(|b| format!("{b:02x}")).collect();
    ensure!(text.contains(&sum), "the output for 3 MB of standard input is {text:?}, without the checksum {sum}");
    ensure!(status == Some(7), "the exit status is {status:?}, not 7");
    Ok("3 MB by standard input, checksum correct, exit status 7".to_owned())
}

/// Waits for two terminal sizes in turn (the first one may be set shortly after the start), then reads a line.
const SIZES: &str = "until stty size | grep -q '^30 100'; do sleep 0.1; done; echo first size; \
                     until stty size | grep -q '^40 120'; do sleep 0.1; done; echo second size; read line; echo got $line";

/// Checks `kubectl exec -it` and a change of the terminal's size.
pub fn terminal(server: &SecondApiServer, protocol: Protocol) -> Result<String> {
    // `script` provides a terminal to kubectl; kubectl forwards the change of its size to the kubelet.
    let mut exec = server.kubectl(&["exec", "-it", POD, "--", "/bin/sh", "-c", SIZES]);
    protocol.set(&mut exec);
    let line = std::iter::once(exec.get_program())
        .chain(exec.get_args())
        .map(|a| format!("'{}'", a.to_string_lossy().replace('\'', r"'\''")))
        .collect::<Vec<_>>()
        .join(" ");
    let tty = tempfile_path("tty");
    let mut command = Command::new("script");
    command.args(["-qec", &format!("stty rows 30 cols 100; tty > {tty}; {line}"), "/dev/null"]);
    for (key, value) in exec.get_envs() {
        if let Some(value) = value {
            command.env(key, value);
        }
    }
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("start script")?;
    let mut stdin = child.stdin.take().context("kubectl has no standard input")?;
    let mut stdout = child.stdout.take().context("kubectl has no standard output")?;
    let mut seen = String::new();
    let _guard = Guard::new(&child)?;
    read_until(&mut stdout, &mut seen, "first size")?;
    let terminal = std::fs::read_to_string(&tty)?;
    let resized = Command::new("stty").args(["-F", terminal.trim(), "rows", "40", "cols", "120"]).status()?;
    ensure!(resized.success(), "stty: {resized}");
    read_until(&mut stdout, &mut seen, "second size")?;
    stdin.write_all(b"hello\n")?;
    read_until(&mut stdout, &mut seen, "got hello")?;
    drop(stdin);
    let _ = child.wait();
    let _ = std::fs::remove_file(&tty);
    Ok("30×100, then 40×120".to_owned())
}

/// Checks that `kubectl attach` receives output of the running container.
pub fn attach(server: &SecondApiServer, protocol: Protocol) -> Result<String> {
    let mut command = server.kubectl(&["attach", POD]);
    protocol.set(&mut command);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut stdout = child.stdout.take().context("kubectl has no standard output")?;
    let mut seen = String::new();
    let _guard = Guard::new(&child)?;
    let result = read_until(&mut stdout, &mut seen, "line ");
    let _ = child.kill();
    let _ = child.wait();
    result?;
    Ok(format!("{:?}", seen.lines().last().unwrap_or_default()))
}

/// Checks `kubectl port-forward` with an HTTP request.
pub fn port_forward(server: &SecondApiServer, protocol: Protocol) -> Result<String> {
    let mut command = server.kubectl(&["port-forward", "--address=127.0.0.1", POD, "0:8088"]);
    protocol.set(&mut command);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stdout = child.stdout.take().context("kubectl has no standard output")?;
    let mut seen = String::new();
    let _guard = Guard::new(&child)?;
    let result = read_until(&mut stdout, &mut seen, "-> 8088").and_then(|()| {
        let port = seen
            .split("127.0.0.1:")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next())
            .context("kubectl printed no port")?;
        // curl must run in the namespace in which kubectl listens.
        let mut curl = Command::new("sh");
        let words: Vec<String> = std::fs::read_to_string(server.kubectl(&[]).get_program())?
            .lines()
            .nth(1)
            .map(|l| {
                l.split_whitespace()
                    .skip(1)
                    .take_while(|w| w.contains("nsenter") || w.starts_with("--"))
                    .map(str::to_owned)
                    .collect()
            })
            .unwrap_or_default();
        curl.args(["-c", &format!("exec {} curl -sS -m 10 http://127.0.0.1:{port}/index.html", words.join(" "))]);
        let text = run(&mut curl, "")?;
        ensure!(text == "served\n", "the pod serves {text:?}");
        Ok(format!("GET by port {port}: {text:?}"))
    });
    let _ = child.kill();
    let _ = child.wait();
    result
}

/// Checks that a file is unchanged after `kubectl cp` to the pod and back.
pub fn cp(server: &SecondApiServer, megabytes: usize) -> Result<String> {
    let (there, back) = (tempfile_path("there"), tempfile_path("back"));
    let mut random = vec![0; megabytes * 1_000_000];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    std::fs::write(&there, &random)?;
    let begin = Instant::now();
    let result = (|| {
        run(&mut server.kubectl(&["cp", &there, &format!("{POD}:/tmp/file")]), "")?;
        run(&mut server.kubectl(&["cp", &format!("{POD}:/tmp/file"), &back]), "")?;
        ensure!(std::fs::read(&back)? == random, "the file came back changed");
        Ok(format!("to the pod and back, bit for bit, in {:.1} s", begin.elapsed().as_secs_f64()))
    })();
    let _ = std::fs::remove_file(&there);
    let _ = std::fs::remove_file(&back);
    result
}

/// Checks the kubelet's metrics, which Prometheus and metrics-server read by the same path.
pub fn metrics(server: &SecondApiServer) -> Result<String> {
    let text = run(&mut server.kubectl(&["get", "--raw", "/api/v1/nodes/x-b/proxy/metrics"]), "")?;
    ensure!(
        text.contains("kubelet_node_name{node=\"x-b\"} 1"),
        "the metrics are not those of x-b: {}",
        &text[..text.len().min(300)]
    );
    Ok(format!("{} lines of x-b's metrics", text.lines().count()))
}

fn tempfile_path(what: &str) -> String {
    let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    std::env::temp_dir().join(format!("raven-{what}-{}-{nanos}", std::process::id())).to_string_lossy().into_owned()
}

fn run(command: &mut Command, input: &str) -> Result<String> {
    let (text, status) = run_with(command, input.as_bytes())?;
    ensure!(status == Some(0), "{command:?}: exit status {status:?}: {text}");
    Ok(text)
}

/// Returns the output (with standard error on failure) and the exit status. Kills the command after [`COMMAND_WITHIN`].
fn run_with(command: &mut Command, input: &[u8]) -> Result<(String, Option<i32>)> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let mut stdin = child.stdin.take().context("the command has no standard input")?;
    let input = input.to_vec();
    std::thread::spawn(move || stdin.write_all(&input));
    let guard = Guard::new(&child)?;
    let output = child.wait_with_output()?;
    drop(guard);
    let text = if output.status.success() || output.stderr.is_empty() {
        String::from_utf8_lossy(&output.stdout).into_owned()
    } else {
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    };
    Ok((text, output.status.code()))
}

/// Kills a process after a time limit, so that a reader of its output does not block forever. Dropping
/// it cancels the limit.
struct Guard {
    _release: std::sync::mpsc::Sender<()>,
}

impl Guard {
    fn new(child: &std::process::Child) -> Result<Self> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
        let (release, released) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            if released.recv_timeout(COMMAND_WITHIN.mul_f64(patience()))
                == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        });
        Ok(Self { _release: release })
    }
}

/// Reads until `word` appears. A [`Guard`] bounds the time if the source prints nothing more.
fn read_until(source: &mut impl Read, seen: &mut String, word: &str) -> Result<()> {
    let end = Instant::now() + OUTPUT_WITHIN.mul_f64(patience());
    let mut bytes = [0; 1024];
    while !seen.contains(word) {
        let n = source.read(&mut bytes)?;
        if n == 0 || Instant::now() > end {
            bail!("{word:?} does not appear in the output: {seen:?}");
        }
        seen.push_str(&String::from_utf8_lossy(&bytes[..n]));
    }
    Ok(())
}
