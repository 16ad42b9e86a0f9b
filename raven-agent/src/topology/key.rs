//! WireGuard keys from outside, checked once.

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::STANDARD};
use sha2::{Digest, Sha256};

/// A WireGuard public key: a Curve25519 point of 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

/// The text is not base64 of 32 bytes.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a WireGuard public key (base64 of 32 bytes)")]
pub struct NotAKey;

impl FromStr for PublicKey {
    type Err = NotAKey;

    fn from_str(text: &str) -> Result<Self, NotAKey> {
        let bytes = STANDARD.decode(text).map_err(|_| NotAKey)?;
        Ok(Self(bytes.try_into().map_err(|_| NotAKey)?))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A WireGuard preshared key of 32 bytes (whitepaper §5.2). `Debug` does not show it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PresharedKey(pub [u8; 32]);

impl PresharedKey {
    /// Parses the output of `wg genpsk`; any other text is hashed with SHA-256. `None` for an empty text, and for a key
    /// of zeros, which WireGuard treats as no key.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let text = bytes.trim_ascii();
        let key = STANDARD.decode(text).ok().and_then(|key| key.try_into().ok());
        let key = key.unwrap_or_else(|| Sha256::digest(text).into());
        (!text.is_empty() && key != [0; 32]).then_some(Self(key))
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(a preshared key)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preshared_key_is_parsed_or_hashed_and_never_shown() {
        let text = STANDARD.encode([7; 32]);
        let key = PresharedKey::from_bytes(format!("{text}\n").as_bytes()).expect("a key");
        assert_eq!(key, PresharedKey([7; 32]));
        assert!(!format!("{key:?}").contains(char::is_numeric));
        let hashed = PresharedKey::from_bytes(b"raven").expect("a key").0;
        assert_eq!(hashed[..4], [0x09, 0x2c, 0xda, 0x39], "the output of sha256sum");
        assert!(PresharedKey::from_bytes(&[0xff; 32]).is_some(), "not text, hashed");
        for none in [" \n", &STANDARD.encode([0; 32])] {
            assert_eq!(PresharedKey::from_bytes(none.as_bytes()), None, "{none:?}");
        }
    }
}
