//! Raven's userspace engine with the kernel's WireGuard. The tunnels are set up first and checked at the end, because
//! WireGuard's own timers take minutes: a session is renewed after 120 s, and an initiator gives up after 90 s.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use raven_tests::{
    Lab, Node,
    bare::{Bare, Engine},
    eventually, probe,
    process::Process,
};

/// WireGuard renews a session that is in use after this time (whitepaper §6.1, Rekey-After-Time).
const REKEY: Duration = Duration::from_secs(120);
/// An initiator that has no answer gives up after this time (Rekey-Attempt-Time).
const GIVES_UP: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(30);
const BULK: u64 = 1_000_000;
/// Addresses of cloud-a on its own link to cloud-b, and of cloud-b.
const LINK_V4: [Ipv4Addr; 2] = [Ipv4Addr::new(172, 30, 0, 1), Ipv4Addr::new(172, 30, 0, 2)];
const LINK_V6: [Ipv6Addr; 2] = [Ipv6Addr::new(0xfd30, 0, 0, 0, 0, 0, 0, 1), Ipv6Addr::new(0xfd30, 0, 0, 0, 0, 0, 0, 2)];

/// Three tunnels between two nodes of the cloud.
pub(crate) struct Interop {
    begin: Instant,
    /// The engine responds, the engine initiates.
    tunnels: [Bare; 2],
    /// A ping per tunnel, every second.
    pings: [Process; 2],
    /// Between two engines, interrupted from the beginning.
    interrupted: Bare,
}

fn ends(lab: &Lab) -> (&Node, &Node) {
    (lab.node("cloud-a"), lab.node("cloud-b"))
}

/// Connects two nodes by a link on which no agent attaches programs. To the uplink of a gateway node, its agent adds the qdisc
/// clsact, and the kernel drops what the device sends until that is done (`dev_deactivate` in net/sched/sch_api.c,
/// `qdisc_graft`). These tunnels may not lose a packet.
fn link(a: &Node, b: &Node) -> Result<()> {
    a.ns.sh(&format!("ip link add aside type veth peer name aside netns {}", b.ns.name))?;
    for (node, v4, v6) in [(a, LINK_V4[0], LINK_V6[0]), (b, LINK_V4[1], LINK_V6[1])] {
        node.ns.sh(&format!(
            "ip addr add {v4}/30 dev aside; ip addr add {v6}/126 dev aside nodad; ip link set aside up"
        ))?;
    }
    Ok(())
}

impl Interop {
    pub(crate) async fn start(lab: &Lab) -> Result<Self> {
        let (a, b) = ends(lab);
        link(a, b)?;
        let v4 = |port| SocketAddr::from((LINK_V4[0], port));
        let v6 = |port| SocketAddr::from((LINK_V6[0], port));
        let responds = Bare::start(lab, 11, [(a, Engine::Raven), (b, Engine::Kernel)], v4).await?;
        let initiates = Bare::start(lab, 12, [(a, Engine::Kernel), (b, Engine::Raven)], v6).await?;
        let interrupted = Bare::start(lab, 13, [(a, Engine::Raven), (b, Engine::Raven)], v4).await?;
        a.ns.nft(&format!(
            "table inet cut {{ chain input {{ type filter hook input priority 0; udp dport {} drop; }}; }}",
            interrupted.port
        ))?;
        interrupted.dial_anew(b, v4(interrupted.port))?;
        let ping = |tunnel: &Bare| {
            let mut ping = b.ns.command("ping");
            ping.args(["-n", "-i", "1", &tunnel.v4[0].to_string()]);
            Process::start(format!("ping-{}", tunnel.device), &lab.logs(), ping)
        };
        let pings = [ping(&responds)?, ping(&initiates)?];
        Ok(Self { begin: Instant::now(), tunnels: [responds, initiates], pings, interrupted })
    }

    /// Bytes in both directions and over both families, with preshared keys; then both ends change their ports.
    pub(crate) async fn transfers(&self, lab: &Lab) -> Result<String> {
        let (a, b) = ends(lab);
        for tunnel in &self.tunnels {
            for (to_a, to_b) in tunnel.addresses(0).into_iter().zip(tunnel.addresses(1)) {
                probe::bulk(&b.ns, &a.ns, to_a, BULK, SOON).await.context("to the responder")?;
                probe::bulk(&a.ns, &b.ns, to_b, BULK, SOON).await.context("to the initiator")?;
            }
            for (mover, far) in [(a, tunnel.v4[1]), (b, tunnel.v4[0])] {
                mover.ns.sh(&format!("wg set {} listen-port {}", tunnel.device, tunnel.port + 100))?;
                let answers = || async { probe::ping(&mover.ns, far.into()).await?.context("no answer") };
                eventually(SOON, "the moved end is followed", answers).await?;
            }
        }
        Ok(format!("{} transfers of {BULK} bytes; both ends moved", 4 * self.tunnels.len()))
    }

    /// Both tunnels have renewed their sessions, and no packet was lost over it.
    pub(crate) async fn renewed(&mut self, lab: &Lab) -> Result<String> {
        tokio::time::sleep((REKEY + SOON).saturating_sub(self.begin.elapsed())).await;
        let mut seen = Vec::new();
        for (tunnel, ping) in self.tunnels.iter().zip(&mut self.pings) {
            ping.signal(Signal::SIGINT)?;
            ping.wait()?;
            let report = ping.output()?;
            let sent = all_answered(&report).with_context(|| tunnel.device.clone())?;
            for node in [ends(lab).0, ends(lab).1] {
                let age = handshake_age(node, &tunnel.device)?;
                ensure!(
                    self.begin.elapsed() > age + REKEY.mul_f64(0.9),
                    "{} on {}: the session of {age:?} ago is the first one",
                    tunnel.device,
                    node.name
                );
            }
            seen.push(format!("{}: {sent} pings answered", tunnel.device));
        }
        Ok(seen.join("; "))
    }

    /// An engine whose peer did not answer for longer than an initiator tries dials it again.
    pub(crate) async fn dials_again(&self, lab: &Lab) -> Result<String> {
        let (a, b) = ends(lab);
        tokio::time::sleep((GIVES_UP + Duration::from_secs(5)).saturating_sub(self.begin.elapsed())).await;
        ensure!(handshake_age(b, &self.interrupted.device).is_err(), "the link was not interrupted");
        a.ns.sh("nft delete table inet cut")?;
        let cut = self.begin.elapsed().as_secs();
        let alive = || async { handshake_age(b, &self.interrupted.device) };
        eventually(SOON, "a handshake", alive).await?;
        Ok(format!("after {cut} s without an answer, without any packet to send"))
    }
}

/// Checks that each ping before the last was answered, and returns their number. The answer to the last one may have been
/// under way when `ping` was stopped.
fn all_answered(report: &str) -> Result<u32> {
    let answered: BTreeSet<u32> = report
        .lines()
        .filter(|line| line.contains(" bytes from "))
        .filter_map(|line| line.split_once("icmp_seq=")?.1.split_once(' ')?.0.parse().ok())
        .collect();
    let last = *answered.last().context("no ping was answered")?;
    let lost: Vec<u32> = (1..last).filter(|number| !answered.contains(number)).collect();
    ensure!(lost.is_empty(), "pings {lost:?} were lost");
    let statistics = report.lines().find(|line| line.contains("packet loss")).context("no statistics")?;
    let sent: u32 = statistics.split(' ').next().unwrap_or_default().parse().context("no number of sent pings")?;
    ensure!(sent <= last + 1, "the last {} pings were lost", sent - last);
    Ok(last)
}

/// Time since the last handshake with the only peer. Fails if there was none.
fn handshake_age(node: &Node, device: &str) -> Result<Duration> {
    let shown = node.ns.run("wg", &["show", device, "latest-handshakes"])?;
    let seconds: u64 = shown.split_whitespace().nth(1).context("no peer")?.parse()?;
    ensure!(seconds != 0, "no handshake so far");
    Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))?)
}
