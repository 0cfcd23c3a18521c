"""Procedural captioned video whose ground truth is exact: what is shown, where, when, and in which words.

scene     the vocabulary; a Thing, a Scene, and where a thing is in every frame
world     WorldConfig: which scenes there are, which are held out, and how scene number i is drawn
render    scenes to pixels
captions  scenes to words
clips     scene number i as a structs.Clip, one at a time or many
"""
