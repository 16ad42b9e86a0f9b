//! Whether a handshake message is worth its arithmetic: invalid messages are dropped, and under load a sender has to
//! prove first that it receives at its address (WireGuard whitepaper §5.4.7, "cookies").

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use gotatun::{
    noise::{TunnResult, rate_limiter::RateLimiter},
    packet::{Packet, WgKind},
    x25519::PublicKey,
};

/// Handshake messages per second and source address before its sender needs a cookie.
const PER_ADDRESS: u64 = 20;
/// Handshake messages per second of all sources before every sender needs a cookie: an attacker can forge its addresses.
/// A gateway with 10,000 peers sees 83 each second.
const IN_ALL: u32 = 400;

/// The state of a device's own key.
pub(crate) struct Guard {
    /// Counts per source address.
    pub(crate) calm: Arc<RateLimiter>,
    /// Demands a cookie always.
    loaded: RateLimiter,
    /// Handshake messages in this second.
    seen: AtomicU32,
}

/// What to do with a datagram.
pub(crate) enum Verdict {
    /// Process it.
    Accept(WgKind),
    /// Send this to its source.
    Reply(WgKind),
    /// It is not WireGuard, or not for this device.
    Drop,
}

impl Guard {
    pub(crate) fn new(own: &PublicKey) -> Self {
        Self {
            calm: Arc::new(RateLimiter::new(own, PER_ADDRESS)),
            loaded: RateLimiter::new(own, 0),
            seen: AtomicU32::new(0),
        }
    }

    /// Checks a datagram.
    pub(crate) fn check(&self, source: SocketAddr, datagram: Packet) -> Verdict {
        let accepted = match self.calm.verify_packet(source, datagram) {
            // Counted after its first MAC is verified, so that only who knows the public key can cause load.
            Ok(handshake @ (WgKind::HandshakeInit(_) | WgKind::HandshakeResp(_)))
                if self.seen.fetch_add(1, Ordering::Relaxed) >= IN_ALL =>
            {
                self.loaded.verify_packet(source, handshake.into())
            }
            checked => checked,
        };
        match accepted {
            Ok(packet) => Verdict::Accept(packet),
            Err(TunnResult::WriteToNetwork(reply)) => Verdict::Reply(reply),
            Err(_) => Verdict::Drop,
        }
    }

    /// To be called once a second.
    pub(crate) fn next_second(&self) {
        self.seen.store(0, Ordering::Relaxed);
        self.calm.try_reset_count();
        self.loaded.try_reset_count();
    }
}
