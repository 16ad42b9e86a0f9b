//! WireGuard keys that come from outside, checked once.

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::STANDARD};
use sha2::{Digest, Sha256};

/// 32 bytes of Curve25519.
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

/// What both ends of every tunnel know besides their own keys (WireGuard whitepaper §5.2). Never shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PresharedKey(pub [u8; 32]);

impl PresharedKey {
    /// From a text as `wg genpsk` makes it; anything else is hashed with SHA-256. Nothing is none, and so are zeros, which WireGuard takes for it.
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
    fn a_preshared_key_is_taken_as_it_is_or_hashed_and_never_shown() {
        let text = STANDARD.encode([7; 32]);
        let key = PresharedKey::from_bytes(format!("{text}\n").as_bytes()).expect("a key");
        assert_eq!(key, PresharedKey([7; 32]));
        assert!(!format!("{key:?}").contains(char::is_numeric));
        let hashed = PresharedKey::from_bytes(b"raven").expect("a key").0;
        assert_eq!(hashed[..4], [0x09, 0x2c, 0xda, 0x39], "sha256sum's");
        assert!(PresharedKey::from_bytes(&[0xff; 32]).is_some(), "no text, and a key all the same");
        for none in [" \n", &STANDARD.encode([0; 32])] {
            assert_eq!(PresharedKey::from_bytes(none.as_bytes()), None, "{none:?}");
        }
    }
}
