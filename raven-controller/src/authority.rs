//! Certificate authorities of the controller's own making: what the conversion webhook's certificate and the proxies' certificates
//! have in common.

use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256};

/// A day.
pub const DAY: SignedDuration = SignedDuration::from_hours(24);
/// Life of a CA.
pub const CA_LIFE: SignedDuration = SignedDuration::from_hours(10 * 365 * 24);

/// A new CA.
#[derive(Debug)]
pub struct NewAuthority {
    /// PEM.
    pub certificate: String,
    /// PEM of its key.
    pub key: String,
    /// When it ends.
    pub not_after: Timestamp,
}

/// Makes a CA. Two of one name are told apart by their keys.
pub fn make(name: &str, now: Timestamp) -> Result<NewAuthority, rcgen::Error> {
    let mut params = params(name);
    let not_after = end(now, CA_LIFE);
    set_life(&mut params, now, not_after);
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = params.self_signed(&key)?.pem();
    Ok(NewAuthority { certificate, key: key.serialize_pem(), not_after })
}

/// What a CA's certificate says, but for its life: also needed to sign with it.
pub fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    params
}

/// Two thirds of its life are over.
pub fn is_due(not_after: Timestamp, life: SignedDuration, now: Timestamp) -> bool {
    not_after.duration_since(now) < life / 3
}

/// Whole days: that is what rcgen takes without the `time` crate, and it is all that is needed.
pub fn end(now: Timestamp, life: SignedDuration) -> Timestamp {
    let seconds = (now + life).as_second();
    Timestamp::from_second(seconds - seconds.rem_euclid(DAY.as_secs())).unwrap_or(now)
}

/// Sets when a certificate begins and ends.
pub fn set_life(params: &mut CertificateParams, now: Timestamp, not_after: Timestamp) {
    let midnight = |at: Timestamp| {
        let date = at.to_zoned(TimeZone::UTC).date();
        let part = |n: i8| u8::try_from(n).unwrap_or(1);
        rcgen::date_time_ymd(date.year().into(), part(date.month()), part(date.day()))
    };
    // A day earlier: clocks differ.
    params.not_before = midnight(now - DAY);
    params.not_after = midnight(not_after);
}
