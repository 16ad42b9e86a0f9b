//! Notes of Events that the controller and the agents publish.

/// The API's limit for the note of an Event, in bytes.
pub const NOTE_MAX: usize = 1000;

/// Returns the text, cut to [`NOTE_MAX`] at the boundary of a character.
pub fn note(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(NOTE_MAX));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_note_is_cut_between_characters() {
        let fits = "é".repeat(NOTE_MAX / 2);
        assert_eq!(note(fits.clone()), fits);
        // The limit is inside the last character.
        assert_eq!(note(format!("a{fits}")), format!("a{}", "é".repeat(NOTE_MAX / 2 - 1)));
    }
}
