//! Handshake messages of an attacker who knows a node's public key.

use anyhow::{Context, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use gotatun::{
    noise::{Tunn, index_table::IndexTable, rate_limiter::RateLimiter},
    packet::Packet,
    x25519::{PublicKey, StaticSecret},
};

/// Parses a public key.
pub fn public_key(base64: &str) -> Result<PublicKey> {
    let bytes: [u8; 32] = STANDARD.decode(base64)?.try_into().ok().context("a key has 32 bytes")?;
    Ok(PublicKey::from(bytes))
}

/// Some public key in base64, by number.
pub fn any_key(number: u32) -> String {
    let mut secret = [7; 32];
    secret[..4].copy_from_slice(&number.to_be_bytes());
    STANDARD.encode(PublicKey::from(&StaticSecret::from(secret)).as_bytes())
}

/// Initiations for the owner of a key, each from another key that it does not know. Their first MAC is valid.
pub fn initiations(to: PublicKey, count: u32) -> Vec<Vec<u8>> {
    let make = |number: u32| {
        let mut secret = [9; 32];
        secret[..4].copy_from_slice(&number.to_be_bytes());
        let secret = StaticSecret::from(secret);
        let limiter = RateLimiter::new(&PublicKey::from(&secret), 100).into();
        let mut tunnel = Tunn::new(secret, to, None, None, IndexTable::from_os_rng(), limiter);
        let message = tunnel.format_handshake_initiation(true).map(Packet::from);
        message.map(|packet: Packet| packet.to_vec()).unwrap_or_default()
    };
    (0..count).map(make).collect()
}
