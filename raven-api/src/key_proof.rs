//! Proof that a node has the private key of the WireGuard key that it publishes: the node's name, signed with that key
//! (XEdDSA, <https://signal.org/docs/specifications/xeddsa/>).
//!
//! A node that has copied another's public key cannot make a proof, and that of the other node has the other's name.

use base64::{Engine, engine::general_purpose::STANDARD};
use ed25519_dalek::{Signature, VerifyingKey};
use xeddsa::{
    ConvertMont, Sign,
    xed25519::{PrivateKey, PublicKey},
};

/// The signed text. Its beginning keeps the signature from being used for anything else.
fn text(node: &str) -> String {
    format!("raven.openyurt.io: the WireGuard key of node {node}")
}

/// Makes a proof for `node`: base64 of 64 bytes. It contains random bytes, so every proof is different.
pub fn prove(private_key: [u8; 32], node: &str) -> String {
    let proof: [u8; 64] = PrivateKey(private_key).sign(text(node).as_bytes(), rand::rng());
    STANDARD.encode(proof)
}

/// True if `proof` was made for `node` with the private key of `public_key`. Both are base64; any other text proves nothing.
pub fn is_proven(public_key: &str, node: &str, proof: &str) -> bool {
    let decode = |text: &str| STANDARD.decode(text).ok();
    let key = decode(public_key).and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    let proof = decode(proof).and_then(|bytes| <[u8; 64]>::try_from(bytes).ok());
    // Strict, because for a point of low order anyone can make signatures.
    let key = key.and_then(|key| VerifyingKey::from_bytes(&PublicKey(key).convert_mont(0).ok()?).ok());
    key.zip(proof)
        .is_some_and(|(key, proof)| key.verify_strict(text(node).as_bytes(), &Signature::from_bytes(&proof)).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Alice's keys of RFC 7748 §6.1.
    const PRIVATE: [u8; 32] = [
        0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2, 0x66, 0x45, 0xdf, 0x4c,
        0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5, 0x1d, 0xb9, 0x2c, 0x2a,
    ];
    const PUBLIC: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
    /// Bob's public key.
    const OTHER: &str = "3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=";

    #[test]
    fn proof_holds_for_one_key_and_one_node() {
        let proof = prove(PRIVATE, "edge-7");
        assert!(is_proven(PUBLIC, "edge-7", &proof));
        assert!(!is_proven(PUBLIC, "edge-8", &proof), "another node");
        assert!(!is_proven(OTHER, "edge-7", &proof), "another key");
        let mut changed = STANDARD.decode(&proof).expect("base64");
        changed[40] ^= 1;
        assert!(!is_proven(PUBLIC, "edge-7", &STANDARD.encode(changed)), "another signature");
    }

    #[test]
    fn malformed_proofs_prove_nothing() {
        let zeros = |n| STANDARD.encode(vec![0; n]);
        for proof in ["", "=", "not base64", &zeros(63), &zeros(64), &zeros(65)] {
            assert!(!is_proven(PUBLIC, "edge-7", proof), "{proof}");
        }
        // For a key of low order, a signature that is the neutral point fits half of all names.
        let mut neutral = [0; 64];
        neutral[0] = 1;
        for number in 0..32 {
            assert!(!is_proven(&zeros(32), &format!("edge-{number}"), &STANDARD.encode(neutral)), "{number}");
        }
        assert!(!is_proven("not base64", "edge-7", &prove(PRIVATE, "edge-7")));
    }
}
