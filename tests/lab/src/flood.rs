//! A flood of forged handshakes from one node against another one, and honest sessions during it.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tokio::task::JoinHandle;

use crate::{Node, bare::Bare, eventually, forge, probe};

/// Addresses from which a flood comes.
const SOURCES: u8 = 250;
/// Different messages of a flood; they are sent in turn.
const MESSAGES: u32 = 64;

/// A running flood. It ends when it is dropped.
#[derive(Debug)]
pub struct Flood {
    stop: Arc<AtomicBool>,
    sending: Option<JoinHandle<Result<Result<f64>>>>,
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Flood {
    /// Sends initiations from `attacker` to `target`, the first end of the tunnel on the node `attacked`: `rate` per second,
    /// in bursts of `burst`. Their senders are unknown to it, and they come from many addresses.
    pub fn start(
        tunnel: &Bare,
        attacker: &Node,
        attacked: &Node,
        target: SocketAddr,
        rate: u32,
        burst: u32,
    ) -> Result<Self> {
        // The attacker owns a whole prefix.
        attacker.ns.sh("ip route replace local 10.77.0.0/16 dev lo")?;
        attacked.ns.sh(&format!("ip route replace 10.77.0.0/16 via {}", attacker.lan_v4))?;
        let messages = forge::initiations(forge::public_key(&tunnel.keys[0])?, MESSAGES);
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, inside) = (stop.clone(), attacker.ns.clone());
        let send = move || -> Result<f64> {
            let sockets = (0..SOURCES)
                .map(|source| UdpSocket::bind((IpAddr::from([10, 77, 0, source]), 0)))
                .collect::<io::Result<Vec<_>>>()?;
            let (begin, mut sent) = (Instant::now(), 0_u32);
            while !stopped.load(Ordering::Relaxed) {
                let number = sent as usize;
                sockets[number % sockets.len()].send_to(&messages[number % messages.len()], target)?;
                sent += 1;
                if sent.is_multiple_of(burst) {
                    let due = begin + Duration::from_secs(1) * sent / rate;
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                }
            }
            Ok(f64::from(sent) / begin.elapsed().as_secs_f64())
        };
        let sending = tokio::spawn(async move { inside.within_async(send).await });
        Ok(Self { stop, sending: Some(sending) })
    }

    /// Ends the flood. Returns the messages per second that were really sent.
    pub async fn stop(mut self) -> Result<f64> {
        self.stop.store(true, Ordering::Relaxed);
        let sending = self.sending.take().context("it is sending")?;
        sending.await??.context("send the flood")
    }
}

/// Makes the second end of the tunnel, which is `node`, start sessions with the first one at `endpoint` until one is
/// answered. With `by_cookie`, until the first end has demanded a cookie and got it (WireGuard whitepaper §5.4.7). Returns
/// whether it has.
pub async fn new_session(tunnel: &Bare, node: &Node, endpoint: SocketAddr, by_cookie: bool) -> Result<bool> {
    let table = format!("cookies{}", tunnel.port);
    // An initiation with its second MAC, which is made of a cookie: type 1, and not zero in the last 16 of 148 bytes.
    node.ns.nft(&format!(
        "table inet {table} {{
            counter sent {{}}
            chain out {{
                type filter hook output priority 0
                udp dport {} @th,64,8 1 @th,1120,128 != 0 counter name sent
            }}
        }}",
        endpoint.port()
    ))?;
    let attempt = || async {
        tunnel.dial_anew(node, endpoint)?;
        let answers = || async { probe::ping(&node.ns, tunnel.v4[0].into()).await?.context("no answer") };
        eventually(Duration::from_secs(20), "an answer through the tunnel", answers).await?;
        let counted = node.ns.sh(&format!("nft list counter inet {table} sent"))?;
        let had_cookie = !counted.contains("packets 0 ");
        ensure!(had_cookie || !by_cookie, "the session came up without a cookie");
        Ok(had_cookie)
    };
    let done = eventually(Duration::from_secs(60), "a new session during the flood", attempt).await;
    node.ns.sh(&format!("nft delete table inet {table}"))?;
    done
}
