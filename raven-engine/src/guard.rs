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
/// A gateway with 10,000 peers, half of which initiate every two minutes, sees 42.
const IN_ALL: u32 = 200;

/// The state of a device's own key.
pub(crate) struct Guard {
    /// Counts per source address.
    pub(crate) calm: Arc<RateLimiter>,
    /// Demands a cookie from everybody.
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
        let is_loaded = self.seen.load(Ordering::Relaxed) >= IN_ALL;
        let limiter = if is_loaded { &self.loaded } else { &*self.calm };
        let checked = limiter.verify_packet(source, datagram);
        // Counted after the first MAC is verified, so that only a sender who knows the public key can cause load.
        let is_handshake = match &checked {
            Ok(packet) => matches!(packet, WgKind::HandshakeInit(_) | WgKind::HandshakeResp(_)),
            Err(refused) => matches!(refused, TunnResult::WriteToNetwork(_)),
        };
        if is_handshake {
            self.seen.fetch_add(1, Ordering::Relaxed);
        }
        match checked {
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use gotatun::{
        noise::{Tunn, handshake::parse_handshake_anon, index_table::IndexTable},
        packet::WgHandshakeInit,
        x25519::StaticSecret,
    };

    use super::*;

    /// An initiation by a stranger.
    fn initiation(to: PublicKey) -> Packet<WgHandshakeInit> {
        let secret = StaticSecret::from([9; 32]);
        let limiter = Arc::new(RateLimiter::new(&PublicKey::from(&secret), 1));
        let mut tunnel = Tunn::new(secret, to, None, None, IndexTable::from_os_rng(), limiter);
        tunnel.format_handshake_initiation(true).expect("an initiation")
    }

    fn source(number: u32) -> SocketAddr {
        ([10, 0, (number >> 8) as u8, number as u8], 1000).into()
    }

    #[test]
    fn under_load_everybody_needs_a_cookie_and_refusing_is_cheap() {
        let private = StaticSecret::from([1; 32]);
        let public = PublicKey::from(&private);
        let guard = Guard::new(&public);
        let message = initiation(public);
        let mut accepted = 0;
        let mut refusing = Duration::ZERO;
        for number in 0..2000 {
            let copy = Packet::copy_from(&*message).into();
            let begin = Instant::now();
            match guard.check(source(number), copy) {
                Verdict::Accept(_) => accepted += 1,
                Verdict::Reply(reply) => {
                    refusing += begin.elapsed();
                    assert!(matches!(reply, WgKind::CookieReply(_)));
                }
                Verdict::Drop => panic!("a valid message was dropped"),
            }
        }
        assert_eq!(accepted, IN_ALL);
        let refusing = refusing / (2000 - IN_ALL);
        // What the attacker wants to be computed.
        let begin = Instant::now();
        for _ in 0..50 {
            parse_handshake_anon(&private, &public, &message).expect("a valid message");
        }
        let accepting = begin.elapsed() / 50;
        println!("refusing: {refusing:?}, accepting: {accepting:?}");
        assert!(refusing * 4 < accepting, "refusing: {refusing:?}, accepting: {accepting:?}");
        // Messages with a wrong MAC cause no load.
        guard.next_second();
        for number in 0..2000 {
            let mut copy = Packet::copy_from(&*message).into_bytes();
            let last = copy.len() - 20;
            copy.buf_mut()[last] ^= 1;
            assert!(matches!(guard.check(source(number), copy), Verdict::Drop));
        }
        assert!(matches!(guard.check(source(0), message.into()), Verdict::Accept(_)));
    }
}
