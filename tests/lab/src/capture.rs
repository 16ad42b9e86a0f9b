//! Records the packets of a device with tcpdump and searches the recording.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::eventually;
use crate::namespace::{Namespace, output};
use crate::process::Process;
use crate::site::Site;

/// Time limit for tcpdump's answers.
const WITHIN: Duration = Duration::from_secs(10);

/// A running tcpdump.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    file: PathBuf,
    /// Number of reports of its counts.
    reports: usize,
    /// Packets that arrived before the kernel had the filter: it counts them, and tcpdump does not write them.
    unfiltered: u64,
}

impl Capture {
    /// Starts to record a device; returns when tcpdump is listening. `filter` may be empty.
    pub async fn start(site: &Site, ns: &Namespace, device: &str, filter: &str) -> Result<Self> {
        let dir = site.dir.join("captures");
        fs::create_dir_all(&dir)?;
        let (name, file) = free_name(&dir, &format!("{}-{device}", ns.name))?;
        let mut command = ns.command("tcpdump");
        // tcpdump must stay root, because other users cannot access the lab's folder.
        // In immediate mode each packet occupies as much of the buffer (64 MiB) as the longest one could: 64 KiB.
        command.args(["-Z", "root", "-n", "-U", "--immediate-mode", "-B", "65536", "-s", "65536", "-i", device, "-w"]);
        command.arg(&file);
        if !filter.is_empty() {
            command.arg(filter);
        }
        let mut process = Process::start(format!("tcpdump-{name}"), &site.logs(), command)?;
        eventually(WITHIN, &format!("tcpdump is listening on {device}"), || {
            let listens = process.ensure_running().and_then(|()| {
                ensure!(process.output()?.contains("listening on"), "tcpdump has not reported that it is listening");
                Ok(())
            });
            async { listens }
        })
        .await?;
        let mut capture = Self { process, file, reports: 0, unfiltered: 0 };
        if !filter.is_empty() {
            // Packets that match may be on their way to the file.
            let mut last = None;
            let settled = eventually(WITHIN, "tcpdump has written what it has received", || {
                let counts = capture.counts().and_then(|(captured, received)| {
                    let missing = received.saturating_sub(captured);
                    ensure!(last.replace(missing) == Some(missing), "{missing} packets are not written");
                    Ok(missing)
                });
                async { counts }
            });
            capture.unfiltered = settled.await?;
        }
        Ok(capture)
    }

    /// Starts to record the internet.
    pub async fn internet(site: &Site) -> Result<Self> {
        Self::start(site, &site.inet, "wire", "").await
    }

    /// Stops and returns the recording. Fails if the kernel dropped packets, so that an empty
    /// recording means no packets.
    pub async fn stop(mut self) -> Result<Recording> {
        self.catch_up().await?;
        self.process.signal(Signal::SIGINT)?;
        let (status, log) = tokio::task::spawn_blocking(move || (self.process.wait(), self.process.output())).await?;
        let log = log?;
        ensure!(status?.success(), "tcpdump: {log}");
        let dropped = log.lines().find(|line| line.contains("dropped by kernel") && !line.contains(','));
        ensure!(dropped.and_then(first_number) == Some(0), "tcpdump missed packets: {log}");
        Ok(Recording { file: self.file })
    }

    /// Waits until tcpdump has written all packets received so far: at SIGINT it discards the rest.
    async fn catch_up(&mut self) -> Result<()> {
        let mut wanted = None;
        eventually(WITHIN, "tcpdump catches up", || {
            let result = self.check_written(&mut wanted);
            async { result }
        })
        .await
    }

    /// The first report sets the number of packets to wait for.
    fn check_written(&mut self, wanted: &mut Option<u64>) -> Result<()> {
        let (captured, received) = self.counts()?;
        let wanted = *wanted.get_or_insert(received - self.unfiltered);
        if captured < wanted {
            self.process.signal(Signal::SIGUSR1)?;
            bail!("{captured} packets are written of {wanted}");
        }
        Ok(())
    }

    /// Returns the numbers of packets that tcpdump has written and that it has received. Fails, and requests them by
    /// SIGUSR1, if they have not been reported since the last call.
    fn counts(&mut self) -> Result<(u64, u64)> {
        self.process.ensure_running()?;
        let log = self.process.output()?;
        let counts: Vec<&str> = log.lines().filter(|line| line.contains("received by filter")).collect();
        let fresh = counts.len() > self.reports;
        self.reports = counts.len();
        match counts.last().filter(|_| fresh).and_then(|line| parse_counts(line)) {
            Some(counts) => Ok(counts),
            None => {
                self.process.signal(Signal::SIGUSR1)?;
                bail!("last counts of tcpdump: {:?}", counts.last())
            }
        }
    }
}

/// Parses `tcpdump: 3 packets captured, 4 packets received by filter, 0 packets dropped by kernel`.
fn parse_counts(line: &str) -> Option<(u64, u64)> {
    let mut parts = line.split(',');
    Some((first_number(parts.next()?)?, first_number(parts.next()?)?))
}

fn first_number(text: &str) -> Option<u64> {
    text.split_whitespace().find_map(|word| word.parse().ok())
}

fn free_name(dir: &Path, base: &str) -> Result<(String, PathBuf)> {
    for n in 0..1000 {
        let name = format!("{base}-{n}");
        let file = dir.join(format!("{name}.pcap"));
        match fs::File::create_new(&file) {
            Ok(_) => return Ok((name, file)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("create {}", file.display())),
        }
    }
    bail!("there are already 1000 captures named {base}")
}

/// A finished capture.
#[derive(Clone, Debug)]
pub struct Recording {
    /// Path of the pcap file.
    pub file: PathBuf,
}

impl Recording {
    /// Counts the packets that match a tcpdump filter; an empty filter matches all.
    pub fn count(&self, filter: &str) -> Result<usize> {
        Ok(self.lines(filter)?.len())
    }

    /// Returns the packets that match a filter, as printed by tcpdump.
    pub fn lines(&self, filter: &str) -> Result<Vec<String>> {
        let mut command = Command::new("tcpdump");
        command.args(["-Z", "root", "-n", "-r"]).arg(&self.file);
        if !filter.is_empty() {
            command.arg(filter);
        }
        Ok(output(&mut command)?.lines().map(str::to_owned).collect())
    }

    /// Reports whether the recording contains these bytes, such as an address or a marker.
    pub fn contains(&self, bytes: &[u8]) -> Result<bool> {
        ensure!(!bytes.is_empty(), "the bytes to search for are empty");
        let content = fs::read(&self.file).with_context(|| format!("read {}", self.file.display()))?;
        Ok(content.windows(bytes.len()).any(|window| window == bytes))
    }

    /// Fails if the recording contains the marker or the address of any pod, in a header or in a payload.
    pub fn ensure_nothing_in_clear(&self, site: &Site, marker: &[u8]) -> Result<()> {
        ensure!(self.count("")? > 0, "no packet was recorded, so the capture proves nothing");
        ensure!(!self.contains(marker)?, "the marker crossed unencrypted: {}", self.file.display());
        let clear = self.lines("net 10.244.0.0/16 or net fd00:244::/32")?;
        ensure!(clear.is_empty(), "{} packets of pods crossed unencrypted, the first: {}", clear.len(), clear[0]);
        let content = fs::read(&self.file)?;
        for pod in site.nodes.iter().flat_map(|n| &n.pods) {
            // Four bytes of an IPv4 address may occur in megabytes of ciphertext by chance; 16 bytes do not.
            let v6 = pod.v6.octets();
            ensure!(!content.windows(16).any(|w| w == v6), "the address {} crossed unencrypted", pod.v6);
        }
        Ok(())
    }
}
