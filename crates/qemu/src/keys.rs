//! Text as key strokes of a US keyboard.

/// A key, by QEMU's key code name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key(pub &'static str);

/// One key with or without shift.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyStroke {
    /// The key.
    pub key: Key,
    /// Whether shift is held.
    pub shift: bool,
}

/// A character that a US keyboard does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the character {} cannot be typed on a US keyboard", .0.escape_debug())]
pub struct UnknownCharacter(pub char);

/// The keys without shift, the character each gives, and the one it gives with shift.
const KEYS: [(&str, char, char); 49] = [
    ("a", 'a', 'A'),
    ("b", 'b', 'B'),
    ("c", 'c', 'C'),
    ("d", 'd', 'D'),
    ("e", 'e', 'E'),
    ("f", 'f', 'F'),
    ("g", 'g', 'G'),
    ("h", 'h', 'H'),
    ("i", 'i', 'I'),
    ("j", 'j', 'J'),
    ("k", 'k', 'K'),
    ("l", 'l', 'L'),
    ("m", 'm', 'M'),
    ("n", 'n', 'N'),
    ("o", 'o', 'O'),
    ("p", 'p', 'P'),
    ("q", 'q', 'Q'),
    ("r", 'r', 'R'),
    ("s", 's', 'S'),
    ("t", 't', 'T'),
    ("u", 'u', 'U'),
    ("v", 'v', 'V'),
    ("w", 'w', 'W'),
    ("x", 'x', 'X'),
    ("y", 'y', 'Y'),
    ("z", 'z', 'Z'),
    ("1", '1', '!'),
    ("2", '2', '@'),
    ("3", '3', '#'),
    ("4", '4', '$'),
    ("5", '5', '%'),
    ("6", '6', '^'),
    ("7", '7', '&'),
    ("8", '8', '*'),
    ("9", '9', '('),
    ("0", '0', ')'),
    ("minus", '-', '_'),
    ("equal", '=', '+'),
    ("bracket_left", '[', '{'),
    ("bracket_right", ']', '}'),
    ("backslash", '\\', '|'),
    ("semicolon", ';', ':'),
    ("apostrophe", '\'', '"'),
    ("grave_accent", '`', '~'),
    ("comma", ',', '<'),
    ("dot", '.', '>'),
    ("slash", '/', '?'),
    ("spc", ' ', ' '),
    ("tab", '\t', '\t'),
];

/// The strokes that type `text`; a newline is the return key.
///
/// # Errors
/// The first character that the keyboard does not have.
pub fn strokes(text: &str) -> Result<Vec<KeyStroke>, UnknownCharacter> {
    text.chars()
        .map(|c| match c {
            '\n' => Ok(KeyStroke { key: Key("ret"), shift: false }),
            _ => KEYS
                .iter()
                .find(|(_, plain, shifted)| c == *plain || c == *shifted)
                .map(|(name, plain, _)| KeyStroke { key: Key(name), shift: c != *plain })
                .ok_or(UnknownCharacter(c)),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_printable_ascii_character_can_be_typed() {
        for c in ' '..='~' {
            assert_eq!(strokes(&c.to_string()).unwrap().len(), 1, "{c}");
        }
        let typed = strokes("Hi!\n").unwrap();
        let names: Vec<_> = typed.iter().map(|s| (s.key.0, s.shift)).collect();
        assert_eq!(names, [("h", true), ("i", false), ("1", true), ("ret", false)]);
    }

    #[test]
    fn a_character_without_a_key_is_named() {
        assert_eq!(strokes("aé"), Err(UnknownCharacter('é')));
    }
}
