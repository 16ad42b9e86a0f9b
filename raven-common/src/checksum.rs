//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624, equation 3).

/// Folds a 32-bit sum of 16-bit words to 16 bits.
#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// Computes the checksum of an IPv4 header without options. The checksum field of `header` must be zero.
/// The result is in host order.
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

/// Updates `checksum` after a 16-bit word of the data changed from `from` to `to`. All values are in host order.
#[inline(always)]
pub const fn update(checksum: u16, from: u16, to: u16) -> u16 {
    !fold(!checksum as u32 + !from as u32 + to as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    // The example header of Wikipedia's article "Internet checksum".
    const HEADER: [u8; 20] = [
        0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0x00, 0x00, 0xc0, 0xa8, 0x00, 0x01, 0xc0, 0xa8,
        0x00, 0xc7,
    ];

    #[test]
    fn checksum_of_the_example_header_is_b861() {
        assert_eq!(ipv4(&HEADER), 0xb861);
    }

    #[test]
    fn incremental_update_equals_full_computation_for_every_ttl() {
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
