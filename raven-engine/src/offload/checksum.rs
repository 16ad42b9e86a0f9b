//! The internet checksum (RFC 1071).
//!
//! Its value does not depend on the byte order in which the words are added, so they are added in the processor's.

use std::net::IpAddr;

/// A sum that is not folded yet. Every part but the last must have an even number of bytes.
#[derive(Clone, Copy, Default)]
pub(crate) struct Sum(u64);

impl Sum {
    /// Adds bytes.
    pub(crate) fn add(self, bytes: &[u8]) -> Self {
        let mut words = bytes.chunks_exact(4);
        let mut sum = self.0;
        for word in &mut words {
            sum += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
        }
        let mut last = [0; 4];
        last[..words.remainder().len()].copy_from_slice(words.remainder());
        Self(sum + u64::from(u32::from_ne_bytes(last)))
    }

    /// Adds the pseudo-header of TCP and UDP (RFC 9293 §3.1, RFC 8200 §8.1). `length`: of header and payload, in bytes.
    pub(crate) fn add_pseudo_header(self, source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Self {
        let add_address = |sum: Self, address| match address {
            IpAddr::V4(v4) => sum.add(&v4.octets()),
            IpAddr::V6(v6) => sum.add(&v6.octets()),
        };
        let length = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
        add_address(add_address(self, source), destination).add(&length).add(&[0, 0, 0, protocol])
    }

    /// The sum in 16 bits, as it is stored in a packet.
    pub(crate) fn fold(self) -> [u8; 2] {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_ne_bytes()
    }

    /// The checksum field that completes the sum.
    pub(crate) fn complement(self) -> [u8; 2] {
        self.fold().map(|byte| !byte)
    }

    /// True if the sum includes a correct checksum field.
    pub(crate) fn is_valid(self) -> bool {
        self.fold() == [0xff, 0xff]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn example_of_rfc_1071() {
        // §3: the bytes 00 01 f2 03 f4 f5 f6 f7 have the sum ddf2.
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::default().add(&bytes).fold(), [0xdd, 0xf2]);
        assert_eq!(Sum::default().add(&bytes[..2]).add(&bytes[2..]).fold(), [0xdd, 0xf2]);
        assert!(Sum::default().add(&bytes).add(&[0x22, 0x0d]).is_valid());
    }

    #[test]
    fn last_byte_counts_as_the_high_one() {
        assert_eq!(Sum::default().add(&[0x12]).fold(), [0x12, 0x00]);
        assert_eq!(Sum::default().add(&[0, 0, 0, 0, 0, 1, 0x12]).fold(), [0x12, 0x01]);
    }
}
