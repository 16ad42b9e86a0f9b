//! Records what passes a device of the lab, by tcpdump, and answers questions about it.

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

/// A running tcpdump.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    file: PathBuf,
}

impl Capture {
    /// Records a device; gives back when tcpdump listens. `filter` may be empty.
    pub async fn start(site: &Site, ns: &Namespace, device: &str, filter: &str) -> Result<Self> {
        let dir = site.dir.join("captures");
        fs::create_dir_all(&dir)?;
        let (name, file) = free_name(&dir, &format!("{}-{device}", ns.name))?;
        let mut command = ns.command("tcpdump");
        // As root: the lab's folder is not for the user that tcpdump would else become.
        command.args(["-Z", "root", "-n", "-U", "--immediate-mode", "-B", "16384", "-i", device, "-w"]).arg(&file);
        if !filter.is_empty() {
            command.arg(filter);
        }
        let mut process = Process::start(format!("tcpdump-{name}"), &site.logs(), command)?;
        eventually(Duration::from_secs(10), &format!("tcpdump on {device} listens"), || {
            let listens = process.ensure_running().and_then(|()| {
                ensure!(process.output()?.contains("listening on"), "it does not say so");
                Ok(())
            });
            async { listens }
        })
        .await?;
        Ok(Self { process, file })
    }

    /// Records what crosses the internet.
    pub async fn internet(site: &Site) -> Result<Self> {
        Self::start(site, &site.inet, "wire", "").await
    }

    /// Stops and gives what was recorded. Fails if the kernel had to leave packets out: an empty record must mean an empty wire.
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

    /// Waits until tcpdump has written all that the kernel has given it by now: at SIGINT it lets the rest lie.
    async fn catch_up(&mut self) -> Result<()> {
        let mut wanted = None;
        let mut told = 0;
        eventually(Duration::from_secs(10), "tcpdump catches up", || {
            let looked = self.look(&mut told, &mut wanted);
            async { looked }
        })
        .await
    }

    /// SIGUSR1 makes tcpdump tell its counts; the first answer says how many packets it must have written.
    fn look(&mut self, told: &mut usize, wanted: &mut Option<u64>) -> Result<()> {
        self.process.ensure_running()?;
        let log = self.process.output()?;
        let counts: Vec<&str> = log.lines().filter(|line| line.contains("received by filter")).collect();
        let fresh = counts.len() > *told;
        *told = counts.len();
        let answer = counts.last().filter(|_| fresh).and_then(|line| parse_counts(line));
        if answer.is_some_and(|(captured, received)| captured >= *wanted.get_or_insert(received)) {
            return Ok(());
        }
        self.process.signal(Signal::SIGUSR1)?;
        bail!("its last counts: {:?}, to be written: {wanted:?}", counts.last())
    }
}

/// `tcpdump: 3 packets captured, 4 packets received by filter, 0 packets dropped by kernel`.
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
            Err(error) => return Err(error).with_context(|| format!("make {}", file.display())),
        }
    }
    bail!("a thousand captures of {base}")
}

/// A finished capture.
#[derive(Clone, Debug)]
pub struct Recording {
    /// The pcap file.
    pub file: PathBuf,
}

impl Recording {
    /// How many packets match a filter of tcpdump's (all when it is empty).
    pub fn count(&self, filter: &str) -> Result<usize> {
        Ok(self.lines(filter)?.len())
    }

    /// The packets that match a filter, as tcpdump prints them.
    pub fn lines(&self, filter: &str) -> Result<Vec<String>> {
        let mut command = Command::new("tcpdump");
        command.args(["-Z", "root", "-n", "-r"]).arg(&self.file);
        if !filter.is_empty() {
            command.arg(filter);
        }
        Ok(output(&mut command)?.lines().map(str::to_owned).collect())
    }

    /// True if these bytes stand anywhere in it: an address, or a marker that a test sent.
    pub fn contains(&self, bytes: &[u8]) -> Result<bool> {
        ensure!(!bytes.is_empty(), "nothing is in everything");
        let content = fs::read(&self.file).with_context(|| format!("read {}", self.file.display()))?;
        Ok(content.windows(bytes.len()).any(|window| window == bytes))
    }

    /// Fails if a marker or any pod's address is to be seen: as sender, receiver, or inside another packet.
    pub fn ensure_nothing_in_clear(&self, site: &Site, marker: &[u8]) -> Result<()> {
        ensure!(self.count("")? > 0, "nothing at all was recorded: this proves nothing");
        ensure!(!self.contains(marker)?, "the marker crossed in clear: {}", self.file.display());
        let clear = self.lines("net 10.244.0.0/16 or net fd00:244::/32")?;
        ensure!(clear.is_empty(), "{} packets of pods crossed in clear, the first: {}", clear.len(), clear[0]);
        let content = fs::read(&self.file)?;
        for pod in site.nodes.iter().flat_map(|n| &n.pods) {
            // Four bytes may meet by chance in megabytes of ciphertext; the IPv6 address may not.
            let v6 = pod.v6.octets();
            ensure!(!content.windows(16).any(|w| w == v6), "the address {} crossed in clear", pod.v6);
        }
        Ok(())
    }
}
