//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624, equation 3).

/// Folds a 32-bit sum of 16-bit words to 16 bits.
#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// Checksum of an IPv4 header without options whose checksum field is zero. Result in host order.
#[inline(always)]
pub fn ipv4(header: &[u8; 20]) -> u16 {
    let mut sum = 0u32;
    let mut i = 0;
    while i < 20 {
        sum += u16::from_be_bytes([header[i], header[i + 1]]) as u32;
        i += 2;
    }
    !fold(sum)
}

/// The checksum after the 16-bit word `from` became `to`. All in host order.
#[inline(always)]
pub const fn update(checksum: u16, from: u16, to: u16) -> u16 {
    !fold(!checksum as u32 + !from as u32 + to as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    // RFC 1071's own example, extended to a header: 45 00 00 73 … b8 61 is the well-known one of Wikipedia.
    const HEADER: [u8; 20] =
        [0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0x00, 0x00, 0xc0, 0xa8, 0x00, 0x01, 0xc0, 0xa8, 0x00, 0xc7];

    #[test]
    fn known_header_has_the_known_checksum() {
        assert_eq!(ipv4(&HEADER), 0xb861);
    }

    #[test]
    fn update_equals_computing_anew_for_every_ttl() {
        for ttl in 1..=255u8 {
            let mut header = HEADER;
            header[8] = ttl;
            let before = ipv4(&header);
            let from = u16::from_be_bytes([header[8], header[9]]);
            header[8] -= 1;
            let to = u16::from_be_bytes([header[8], header[9]]);
            assert_eq!(update(before, from, to), ipv4(&header), "ttl {ttl}");
        }
    }
}
