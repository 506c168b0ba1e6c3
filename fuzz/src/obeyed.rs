//! What must not stand in text that is shown, said in another way than by what keeps it out.

/// Turns what follows around, or cannot be seen.
pub fn obeyed(c: char) -> bool {
    let parts = [
        0xad..=0xad,
        0x61c..=0x61c,
        0x200b..=0x200f,
        0x202a..=0x202e,
        0x2060..=0x2069,
        0xfeff..=0xfeff,
        0xe0000..=0xe007f,
    ];
    parts.iter().any(|part| part.contains(&u32::from(c)))
}
